"""A loop small enough to be started, stopped, damaged and resumed many times a second; also a program of its own."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_custom.checkpoint import Checkpointer
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, with_run_dir
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.launch import launch
from lightning_custom.loop import seed_step
from tests.forked import Forked


@dataclass(frozen=True, kw_only=True)
class CountingConfig(RunConfig):
    """Settings of :func:`run`."""

    steps: int = 6
    """Updates."""
    checkpoint_every: int = 2
    """Steps between two checkpoints."""
    accelerator: str = "cpu"
    """Device."""
    lr: float = 0.1
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's betas."""
    loss: Literal["square", "absolute"] = "square"
    """Loss."""
    size: int = 3
    """Inputs of the network."""
    pause: float = 0.0
    """Seconds that a step sleeps."""
    workers: int = 0
    """Data-loading processes."""


@dataclass(frozen=True, kw_only=True)
class CountVerb:
    """Print a number."""

    run_dir: str
    """Unused, but required."""
    count: int = 3
    """Number to print."""


PRESETS = {"small": {}, "wide": {"size": 5, "lr": 0.2, "betas": (0.5, 0.9)}}


@dataclass
class CountingState:
    """A network, its optimizer, and the sum of its losses."""

    network: nn.Module
    optimizer: Optimizer
    total: Tensor
    step: int = 0


def new_state(fabric: Fabric, config: CountingConfig) -> CountingState:
    torch.manual_seed(config.seed)
    network = nn.Linear(config.size, 1)
    network, optimizer = fabric.setup(network, Adam(network.parameters(), config.lr, config.betas))
    return CountingState(network, optimizer, torch.zeros((), dtype=torch.float64))


def take_step(fabric: Fabric, config: CountingConfig, state: CountingState) -> None:
    rng = seed_step(config.seed, state.step, fabric)
    inputs = take_share(torch.randn(8, config.size, generator=rng.shared), fabric)
    distance = state.network(inputs) - 1
    loss = (distance.square() if config.loss == "square" else distance.abs()).mean()
    state.optimizer.zero_grad()
    fabric.backward(loss)
    mean_gradients_(fabric, state.network)
    state.optimizer.step()
    state.total += loss.detach()
    state.step += 1


def run(
    fabric: Fabric, config: CountingConfig, *, after_step: Callable[[CountingState], None] = lambda state: None
) -> CountingState:
    config = with_run_dir(fabric, config)
    state = new_state(fabric, config)
    numbers = torch.utils.data.TensorDataset(torch.arange(16))
    batches = Batches(
        fabric, list(numbers), batch_size=4, seed=0, num_workers=config.workers, multiprocessing_context="fork"
    )
    with Checkpointer(fabric, config, best="score") as checkpointer:
        checkpointer.restore(state)
        while state.step < config.steps:
            if config.workers:
                next(batches)
            take_step(fabric, config, state)
            after_step(state)
            if checkpointer.due(state.step):
                checkpointer.save(state)
            if checkpointer.stop_requested:
                break
    return state


def main(config: CountingConfig) -> str:
    fabric = launch(config)
    config = with_run_dir(fabric, config)

    def after_step(state: CountingState) -> None:
        print(f"step {state.step}", flush=True)
        time.sleep(config.pause)

    run(fabric, config, after_step=after_step)
    return str(config.run_dir)


def program(words: list[str] | None = None) -> int:
    verbs = {"count": (CountVerb, lambda request: print(request.count))}
    return command_line(CountingConfig, main, presets=PRESETS, verbs=verbs, arguments=words)


class Started(Forked):
    """The program in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        super().__init__(folder / "log.txt", program, list(words))


if __name__ == "__main__":
    sys.exit(program())
