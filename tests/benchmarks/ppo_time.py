"""Where the time of recipes.ppo goes: milliseconds of a rollout and its updates, beside the environments alone.

    python -m tests.benchmarks.ppo_time
    python -m tests.benchmarks.ppo_time --envs 64 --vectorised

The settings of ``ppo_speed``. Clocks stand around the parts that the loop is written in, and take a little of the time
themselves; ``rest`` is what is between them: noise for the actions, metrics, the progress bar.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric import Fabric

from lightning_custom.compiled_update import CompiledUpdate
from lightning_custom.environments.batched import BatchedEnvironments
from lightning_custom.environments.makers import MakeEnvironment, MakeVector
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.flat_adam import FlatAdam
from lightning_custom.launch import launch
from lightning_custom.progress import Progress
from lightning_custom.rollout import Rollout
from recipes import ppo
from tests.benchmarks.interleave import machine
from tests.benchmarks.ppo_speed import ROLLOUT, config, stepping_alone

WARM = 8


class Clocks:
    """Seconds by name, from the end of step ``WARM`` to that of the last; not of the validation after it."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.seconds = self.running
        self.started = self.ended = 0.0

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.running[name] += time.perf_counter() - started

        return timed

    def around_each(self, name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """A generator function with the time of each of its items counted."""

        def timed(*args: Any) -> Iterator[Any]:
            items, end = function(*args), object()
            following = self.around(name, lambda: next(items, end))
            yield from iter(following, end)

        return timed

    def at_the_end_of(self, step: int) -> None:
        """Begin anew after the warm-up."""
        self.ended = time.perf_counter()
        if step == WARM:
            self.running.clear()
            self.started = time.perf_counter()
        self.seconds = self.running.copy()


def read(num_envs: int, steps: int, threads: int, *, vectorised: bool, compiled: bool) -> dict[str, float]:
    """Milliseconds of each part of a rollout and its updates."""
    settings = config(num_envs, WARM + steps, threads=threads, vectorised=vectorised, compile=compiled)
    clocks, forward = Clocks(), ppo.acting_network
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(patch.object(owner, name, replacement))

        for kind in (EnvironmentVector, BatchedEnvironments):
            put(kind, "step", clocks.around("environments", kind.step))
        put(ppo, "acting_network", lambda *args: clocks.around("policy", forward(*args)))
        for part in ("observe", "record"):
            put(Rollout, part, clocks.around("keeping what happened", getattr(Rollout, part)))
        put(ppo, "estimate", clocks.around("values and advantages", ppo.estimate))
        put(ppo, "minibatches", clocks.around_each("minibatches", ppo.minibatches))
        if compiled:
            put(CompiledUpdate, "__call__", clocks.around("compiled update", CompiledUpdate.__call__))
        else:
            put(ppo, "ppo_loss", clocks.around("loss", ppo.ppo_loss))
            put(Fabric, "backward", clocks.around("backward pass", Fabric.backward))
            put(ppo, "clip_norm_", clocks.around("gradient norm", ppo.clip_norm_))
            put(FlatAdam, "step", clocks.around("Adam", FlatAdam.step))
        show = Progress.show
        put(Progress, "show", lambda self, step: (clocks.at_the_end_of(step), show(self, step)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        ppo.train(
            launch(settings),
            replace(settings, run_dir=folder),
            make_env=MakeEnvironment(settings.env),
            make_vector=MakeVector(settings.env) if vectorised else None,
        )
    total = clocks.ended - clocks.started
    found = dict(clocks.seconds) | {"rest": total - sum(clocks.seconds.values()), "all": total}
    return {name: 1000 * seconds / steps for name, seconds in found.items()}


def main() -> None:
    """Print a table for the loop as it is and one for it compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vectorised", action="store_true")
    given = parser.parse_args()
    print(f"CartPole, {given.envs} x {ROLLOUT}: milliseconds of a rollout with its updates, {given.threads} thread(s)")
    for compiled in (False, True):
        found = read(given.envs, given.steps, given.threads, vectorised=given.vectorised, compiled=compiled)
        print("compiled" if compiled else "eager")
        for name, milliseconds in found.items():
            print(f"  {name:<24}{milliseconds:8.2f}{milliseconds / found['all']:8.1%}")
    alone = 1000 * given.envs * ROLLOUT / stepping_alone(given.envs, 200)
    print(f"the environments alone, one after another: {alone:.2f} ms")
    print(machine())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
