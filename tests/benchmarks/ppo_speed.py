"""Environment steps a second of recipes.ppo against stable-baselines3, CleanRL and sheeprl, on the same work.

    python -m tests.benchmarks.ppo_speed
    python -m tests.benchmarks.ppo_speed --cleanrl PATH/TO/cleanrl/ppo.py --sheeprl PATH/TO/its/bin/python

CartPole, two fully connected networks of 64 x 64, 128 steps a rollout, 4 epochs of 4 minibatches, Adam, everything as
CleanRL's defaults. Every contender trains from nothing and reports the environment steps a second of its rollouts and
updates, without imports, the first rollouts and evaluation. CleanRL's script is run as it is, from a copy outside of
this repository, and sheeprl by the Python that has it, both in a process of their own; where no path is given they are
left out.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_custom.environments.makers import MakeEnvironment, MakeVector
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.launch import launch
from lightning_custom.metrics import read_rows
from lightning_custom.testing import single_process
from recipes import ppo
from tests.benchmarks.interleave import machine

ROLLOUT, WARM, ROUNDS = 128, 5, 5


def config(num_envs: int, steps: int, **fields: object) -> ppo.PPOConfig:
    """CleanRL's defaults."""
    settings = ppo.PPOConfig(
        num_envs=num_envs, rollout_steps=ROLLOUT, epochs=4, minibatches=4, lr=2.5e-4, discount=0.99, gae_decay=0.95,
        anneal_clip=False, clip_value=True, entropy_coefficient=0.01, steps=steps, log_every=WARM, validate_every=0,
        checkpoint_every=0, val_episodes=2, accelerator="cpu",
    )  # fmt: skip
    return replace(settings, **fields)  # type: ignore[arg-type]


def ours(num_envs: int, steps: int, threads: int, *, vectorised: bool = False, compiled: bool = False) -> float:
    """Environment steps a second of this package's loop, everything around it included."""
    settings = config(num_envs, steps, threads=threads, vectorised=vectorised, compile=compiled)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ppo.train(
            launch(settings),
            replace(settings, run_dir=folder),
            make_env=MakeEnvironment(settings.env),
            make_vector=MakeVector(settings.env) if vectorised else None,
        )
        return rate_in(folder)


def rate_in(run_dir: str) -> float:
    """Environment steps a second of a run, but for its first row of metrics."""
    rates = [row["charts/SPS"] for row in read_rows(run_dir) if "charts/SPS" in row]
    return statistics.harmonic_mean(rates[1:])


def with_stable_baselines3(num_envs: int, steps: int, threads: int) -> float:
    """The same by stable-baselines3, with DummyVecEnv as by default."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(threads)
    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", num_envs), n_steps=ROLLOUT, batch_size=num_envs * ROLLOUT // 4,
        n_epochs=4, learning_rate=lambda left: 2.5e-4 * left, gamma=0.99, gae_lambda=0.95, clip_range=0.2,
        clip_range_vf=0.2, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, device="cpu",
    )  # fmt: skip
    return rate_of(model, steps, warm=WARM)


def rate_of(model: Any, steps: int, *, warm: int) -> float:
    """Environment steps a second of a model of stable-baselines3 over ``steps`` rollouts but for the first ``warm``."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.times.append(time.perf_counter())

    clock, size = Clock(), model.n_steps * model.n_envs
    model.learn(size * steps, callback=clock)
    clock.times.append(time.perf_counter())
    return (len(clock.times) - 1 - warm) * size / (clock.times[-1] - clock.times[warm])


def printed_by(command: list[str], threads: int) -> str:
    """What a command prints that runs with so many threads in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:3]}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def with_cleanrl(script: str, num_envs: int, steps: int, threads: int) -> float:
    """The same by CleanRL's script, which prints its rate since its start; read between two of its prints."""
    total = num_envs * ROLLOUT * steps
    command = [sys.executable, script, "--num-envs", str(num_envs), "--total-timesteps", str(total), "--no-cuda"]
    rates = [int(text) for text in re.findall(r"SPS: (\d+)", printed_by(command, threads))]
    counts = [num_envs * ROLLOUT * (i + 1) for i in range(len(rates))]
    seconds = [count / rate for count, rate in zip(counts, rates, strict=True)]
    return (counts[-1] - counts[WARM]) / (seconds[-1] - seconds[WARM])


CLOCKED_SHEEPRL = """
import time
from sheeprl.algos.ppo import ppo
from sheeprl.cli import run

anneal, times = ppo.anneal, []
def clocked(*given):  # what an iteration begins with
    times.append(time.perf_counter())
    return anneal(*given)
ppo.anneal = clocked
run()
print("times:", *times)
"""


def with_sheeprl(python: str, num_envs: int, steps: int, threads: int) -> float:
    """The same by sheeprl, with its own settings for benchmarks where CleanRL's defaults do not say otherwise."""
    command = [
        python, "-c", CLOCKED_SHEEPRL, "exp=ppo_benchmarks", f"env.num_envs={num_envs}", f"num_threads={threads}",
        f"algo.total_steps={num_envs * ROLLOUT * steps}", f"algo.per_rank_batch_size={num_envs * ROLLOUT // 4}",
        "algo.update_epochs=4", "algo.anneal_lr=True", "algo.optimizer.lr=2.5e-4", "algo.clip_vloss=True",
        "algo.ent_coef=0.01", "algo.encoder.mlp_layers=0", "algo.actor.mlp_layers=2", "algo.critic.mlp_layers=2",
        "checkpoint.every=0",
    ]  # fmt: skip
    (line,) = re.findall(r"times: (.*)", printed_by(command, threads))
    times = [float(text) for text in line.split()]
    return (len(times) - 1 - WARM) * num_envs * ROLLOUT / (times[-1] - times[WARM])


def stepping_alone(num_envs: int, steps: int) -> float:
    """The floor: the environments with given actions."""
    envs = EnvironmentVector(single_process(), MakeEnvironment("CartPole-v1"), num_envs, seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (steps * ROLLOUT, num_envs))
    started = time.perf_counter()
    for action in actions:
        envs.step(action)
    return actions.size / (time.perf_counter() - started)


def contenders(
    num_envs: int, steps: int, threads: int, cleanrl: str | None, sheeprl: str | None
) -> dict[str, Callable[[], float]]:
    """By name, a run of each."""
    size = (num_envs, steps, threads)
    found: dict[str, Callable[[], float]] = {
        "recipes.ppo": partial(ours, *size),
        "recipes.ppo --compile true": partial(ours, *size, compiled=True),
    }
    if num_envs >= 16:
        found["recipes.ppo --vectorised true"] = partial(ours, *size, vectorised=True)
        found["recipes.ppo, both"] = partial(ours, *size, vectorised=True, compiled=True)
    if importlib.util.find_spec("stable_baselines3") is not None:
        found["stable-baselines3"] = partial(with_stable_baselines3, *size)
    if cleanrl is not None:
        found["CleanRL"] = partial(with_cleanrl, cleanrl, *size)
    if sheeprl is not None:
        found["sheeprl"] = partial(with_sheeprl, sheeprl, *size)
    found["environments alone"] = partial(stepping_alone, num_envs, steps)
    return found


def report(title: str, rounds: int, runs: dict[str, Callable[[], float]], over: str = "stable-baselines3") -> str:
    """A table: the median rate of each, and how many times that of the peer ``over``, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run())
    lines = [f"{title:<38}{'steps/s':>10}{f'over {over}':>24}   lowest to highest"]
    peer = rates.get(over)
    for name, found in rates.items():
        ratio = ""
        if peer is not None:
            ratios = [a / b for a, b in zip(found, peer, strict=True)]
            ratio = f"{statistics.median(ratios):>24.2f}   {min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"  {name:<36}{statistics.median(found):>10,.0f}{ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cleanrl", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--sheeprl", type=lambda text: str(Path(text).absolute()), metavar="PYTHON")
    given = parser.parse_args()
    for number in given.envs:
        runs = contenders(number, given.steps, given.threads, given.cleanrl, given.sheeprl)
        title = f"CartPole, {number} x {ROLLOUT}, {given.threads} thread(s)"
        print(report(title, given.rounds, runs), flush=True)
    print(machine())
