"""Environment steps a second of recipes.dqn and recipes.sac against stable-baselines3, with the default presets.

    python -m tests.benchmarks.value_speed

DQN on CartPole (256 steps and 128 updates of 64 in turn), SAC on Pendulum (an update of 256 after each step); the same
networks, settings and number of updates, one thread. Each contender trains from nothing and is timed after its first
random steps, everything around the loop included, validation and checkpoints left out.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.launch import launch
from lightning_custom.metrics import STEPS_PER_SECOND, read_rows
from recipes import dqn, sac
from tests.benchmarks.interleave import Contender, interleave, machine, table

ROUNDS = 5
SHELL: dict[str, Any] = {
    "validate_every": 0, "checkpoint_every": 0, "val_episodes": 2, "accelerator": "cpu", "threads": 1,
}  # fmt: skip
DQN = dqn.DQNConfig(steps=40, log_every=8, **SHELL)
SAC = sac.SACConfig(steps=800, log_every=200, **SHELL)


def recipe(train: Callable[..., Any], config: Any) -> Contender:
    """A round of a recipe: seconds of an environment step after the first row of metrics."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(launch(config), replace(config, run_dir=folder), make_env=MakeEnvironment(config.env))
            rates = [row[STEPS_PER_SECOND] for row in read_rows(folder) if STEPS_PER_SECOND in row]
        return sum(1 / rate for rate in rates[1:]) / len(rates[1:]) / (config.train_every * config.num_envs)

    return run


def stable_baselines3(config: Any, kind: str, **settings: Any) -> Contender:
    """A round of stable-baselines3, timed from the same environment step on."""

    def run() -> float:
        import stable_baselines3
        from stable_baselines3.common.callbacks import BaseCallback

        first, last = (number * config.train_every for number in (config.log_every, config.steps))

        class Clock(BaseCallback):
            started = 0.0

            def _on_step(self) -> bool:
                if self.num_timesteps == first:
                    self.started = time.perf_counter()
                return True

        torch.set_num_threads(1)
        clock = Clock()
        model = getattr(stable_baselines3, kind)(
            "MlpPolicy", config.env, buffer_size=config.capacity, learning_starts=config.learning_starts,
            batch_size=config.batch_size, gamma=config.discount, train_freq=config.train_every,
            gradient_steps=config.updates, device="cpu", **settings,
        )  # fmt: skip
        model.learn(last, callback=clock)
        return (time.perf_counter() - clock.started) / (last - first)

    return run


def report(rounds: int = ROUNDS) -> Iterator[str]:
    """A table for each algorithm; a step is one of the environment."""
    width = {"policy_kwargs": {"net_arch": [DQN.width, DQN.width]}}
    yield table(
        "DQN, CartPole",
        interleave(
            {
                "stable-baselines3": stable_baselines3(
                    DQN, "DQN", learning_rate=DQN.lr, target_update_interval=10, max_grad_norm=DQN.max_grad_norm,
                    exploration_fraction=0.16, exploration_final_eps=DQN.epsilon, **width,
                ),
                "recipes.dqn": recipe(dqn.train, DQN),
            },
            rounds,
            targets={"recipes.dqn": 1.0},
        ),
    )  # fmt: skip
    yield table(
        "SAC, Pendulum",
        interleave(
            {
                "stable-baselines3": stable_baselines3(SAC, "SAC", learning_rate=SAC.actor_lr),
                "recipes.sac": recipe(sac.train, SAC),
            },
            rounds,
            targets={"recipes.sac": 1.0},
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in report():
        print(part, flush=True)
    print(machine())
