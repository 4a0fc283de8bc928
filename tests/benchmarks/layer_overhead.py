"""What the layer adds to a step: a loop on bare Fabric, the same with the layer on, and raw PyTorch beside them.

    python -m tests.benchmarks.layer_overhead

The layer is what ``recipes.classification`` calls in a step besides its batch: seeding, the learning rate, the
confusion matrix, the means, the progress bar (as on a terminal), the question whether to save or stop, and every 100
steps the scores and a row of metrics on the disk. A second table gives each of these pieces on its own, and some that
other recipes call. The batch is scaled until a raw step takes about 5 ms.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from lightning_custom import schedules
from lightning_custom.adversarial import frozen
from lightning_custom.checkpoint import Checkpointer
from lightning_custom.config import RunConfig
from lightning_custom.confusion import ConfusionMatrix
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.ema import EMA
from lightning_custom.launch import launch
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.networks import MLPDiscriminator
from lightning_custom.progress import Progress
from tests.benchmarks.interleave import interleave, machine, quiet, stopwatch, table

STEP_SECONDS = 5e-3
STEPS = 100
"""Steps of a round; a row of metrics is written in each."""
TARGET = 1.02
ROUNDS = 41
CLASSES = 10

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass
class State:
    """What the checkpointer of the loop with the layer asks for."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    confusion: ConfusionMatrix
    metrics: MetricLogger
    step: int = 0


def network() -> nn.Module:
    """A classifier of 784 numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, CLASSES),
    )  # fmt: skip


def batch_of(size: int) -> Batch:
    """Noise with labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 784, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def raw_loop(batch: Batch, steps: int = STEPS) -> Iterator[None]:
    """Raw PyTorch; each ``next`` does ``steps`` steps, in the loops below :data:`STEPS`."""
    model = network()
    optimizer = AdamW(model.parameters(), fused=True)
    while True:
        for _ in range(steps):
            loss = cross_entropy(model(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def fabric_loop(fabric: Fabric, batch: Batch) -> Iterator[None]:
    """Bare Fabric: ``setup`` and ``backward``."""
    model = network()
    model, optimizer = fabric.setup(model, AdamW(model.parameters(), fused=True))
    while True:
        for _ in range(STEPS):
            loss = cross_entropy(model(batch[0]), batch[1])
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        yield


def layer_loop(fabric: Fabric, batch: Batch, config: RunConfig) -> Iterator[None]:
    """Bare Fabric and the layer."""
    model = network()
    model, optimizer = fabric.setup(model, AdamW(model.parameters(), fused=True))
    metrics, confusion = MetricLogger(fabric, config.run_dir), ConfusionMatrix(CLASSES, fabric)
    state, schedule = State(model, optimizer, confusion, metrics), schedules.Cosine(1e-3, config.steps)
    with Checkpointer(fabric, config) as checkpointer, Progress(fabric, config.steps) as progress:
        checkpointer.restore(state)
        while True:
            for _ in range(STEPS):
                seed_step(config.seed, state.step, fabric)
                schedules.set_learning_rate(optimizer, schedule, state.step)
                logits = model(batch[0])
                loss = cross_entropy(logits, batch[1])
                optimizer.zero_grad()
                fabric.backward(loss)
                mean_gradients_(fabric, model)
                optimizer.step()
                state.step += 1
                confusion.update(logits.detach(), batch[1])
                metrics.update({"train/loss": loss})
                progress.show(state.step)
                if due(state.step, config.log_every, last=config.steps):
                    progress.report(state.step, metrics.flush(state.step, confusion.flush("train/")))
                if checkpointer.due(state.step):
                    checkpointer.save(state)
            yield


def batch_size_for(seconds: float) -> int:
    """The batch whose raw step takes about ``seconds``: by a line through the fastest steps of two sizes."""
    fastest = {}
    for size in (32, 128):
        loop = raw_loop(batch_of(size), steps=1)
        step = stopwatch(lambda loop=loop: next(loop), 1, time.perf_counter)
        fastest[size] = min(step() for _ in range(150))
    slope = (fastest[128] - fastest[32]) / 96
    return max(round(32 + (seconds - fastest[32]) / slope), 8)


def compare(rounds: int) -> str:
    """The three loops as a table."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = RunConfig(
            steps=10**9, log_every=STEPS, checkpoint_every=0, run_dir=folder, accelerator="cpu", devices=1, threads=1
        )
        fabric = launch(config)
        size = batch_size_for(STEP_SECONDS)
        batch = batch_of(size)
        loops = {
            "bare Fabric": fabric_loop(fabric, batch),
            "bare Fabric and the layer": layer_loop(fabric, batch, config),
            "raw PyTorch": raw_loop(batch),
        }
        contenders = {
            name: stopwatch(lambda loop=loop: next(loop), STEPS, time.perf_counter) for name, loop in loops.items()
        }
        results = interleave(contenders, rounds, targets={"bare Fabric and the layer": TARGET})
        for loop in loops.values():
            loop.close()
    return table(f"layer, MLP of width 256, batch {size}", results)


def pieces(fabric: Fabric, checkpointer: Checkpointer, run_dir: str) -> dict[str, Callable[[], object]]:
    """What the library does in a step, one call of each."""
    images, labels = torch.rand(4096, 1, 28, 28), torch.randint(CLASSES, (4096,))
    batches = Batches(fabric, TensorDataset(images, labels), batch_size=64, seed=0)
    metrics, confusion = MetricLogger(fabric, run_dir), ConfusionMatrix(CLASSES, fabric)
    raw = MLPDiscriminator(CLASSES, (1, 8, 8), 16)
    module, optimizer = fabric.setup(raw, AdamW(raw.parameters()))
    average, losses = EMA(module, half_life=1000.0), dict(zip("abc", torch.rand(3), strict=True))
    logits, latent = torch.randn(64, CLASSES), torch.randn(64, 32)
    bar, schedule, steps = Progress(fabric, 10**9), schedules.Cosine(1e-3, 10**6), count(1)

    def freeze() -> None:
        with frozen(module):
            pass

    def flush() -> None:
        metrics.update(losses)
        metrics.flush(1)

    return {
        "seed_step": lambda: seed_step(0, 17, fabric),
        "set_learning_rate, cosine": lambda: schedules.set_learning_rate(optimizer, schedule, 17),
        "next(Batches), in memory, 64 of 28x28": lambda: next(batches),
        "ConfusionMatrix.update, batch 64": lambda: confusion.update(logits, labels[:64]),
        "MetricLogger.update, 1 tag": lambda: metrics.update({"a": losses["a"]}),
        "MetricLogger.update, 3 tags": lambda: metrics.update(losses),
        "MetricLogger.update and flush, 3 tags": flush,
        "Progress.show, on a terminal": lambda: bar.show(next(steps)),
        "Checkpointer.due": lambda: checkpointer.due(1),
        "frozen, 3 layers": freeze,
        "EMA.update_, 3 layers": lambda: average.update_(batch_size=8, samples_seen=10**6),
        "take_share": lambda: take_share(latent, fabric),
        "mean_gradients_, 1 process": lambda: mean_gradients_(fabric, module),
    }


def pieces_table(rounds: int, calls: int = 100) -> str:
    """Each piece's microseconds a call."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = RunConfig(run_dir=folder, steps=10**9, checkpoint_every=0)
        fabric = Fabric(accelerator="cpu", devices=1)
        with Checkpointer(fabric, config) as checkpointer:
            contenders = {
                name: stopwatch(lambda piece=piece: [piece() for _ in range(calls)], calls, time.perf_counter)
                for name, piece in pieces(fabric, checkpointer, folder).items()
            }
            results = interleave(contenders, rounds)
    lines = [f"  {result.name:<48} {result.seconds * 1e6:9.1f}" for result in results]
    return "\n".join([f"{'one call of':<50} {'us':>9}", *lines])


def report(rounds: int = ROUNDS) -> str:
    """The loops, then the pieces."""
    return f"{compare(rounds)}\n{pieces_table(rounds)}"


if __name__ == "__main__":
    print(report())
    print(machine())
