"""Environments that gymnasium steps all at once, behind the interface of ``EnvironmentVector``."""

import atexit
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from lightning.fabric import Fabric

from lightning_custom.distributed import process_item, share
from lightning_custom.environments.arrays import Array, Observations, check_spaces, empty_observations, write_row
from lightning_custom.environments.layers import environment_state, restore_environment_, unknown_layer
from lightning_custom.environments.plain import from_stored, to_stored
from lightning_custom.environments.vector import Episode
from lightning_custom.environments.verified import as_bytes
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed
from lightning_custom.stopping import STOP_SIGNALS

Vector = VectorEnv[Any, Any, Any]


class BatchedEnvironments:
    """This process's share of ``num_envs`` environments, in one gymnasium ``VectorEnv``: fast where its entry point is.

        def make_vector(num_envs):
            return gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point")

        envs = BatchedEnvironments(fabric, make_vector, config.num_envs, seed=config.seed)

    Attributes are those of :class:`~lightning_custom.environments.vector.EnvironmentVector`. All autoreset modes are
    right, with one thing to know: where the vector resets in the *next* step, as CartPole's does, that step takes no
    action, and :attr:`ignored` is true; leave it out of the losses. Processes that ``make_vector`` starts ignore stop
    signals, so that the run can end its step and save.

    The environments of a process share one random generator and one state. So another number of processes plays
    other episodes, and :class:`ConfigError` refuses to resume on one.
    """

    def __init__(self, fabric: Fabric, make_vector: Callable[[int], Vector], num_envs: int, *, seed: int) -> None:
        count = share(num_envs, fabric, "num_envs")
        self.num_envs, self.seed = num_envs, seed
        self.indices = range(fabric.global_rank * count, (fabric.global_rank + 1) * count)
        self._item, self._processes = process_item(fabric), fabric.world_size
        with _stop_signals_ignored():
            self._vector = make_vector(count)
        # At exit multiprocessing would end its processes by a signal, which they ignore, and wait for them for ever.
        atexit.register(_close, weakref.ref(self._vector))
        self._mode = self._autoreset_mode(count)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        check_spaces(self.observation_space, self.action_space)
        with _stop_signals_ignored():
            self.inexact = _why_inexact(make_vector, count)

        self.observations: Observations
        self.final_observations = empty_observations(self.observation_space, count)
        self.rewards = np.zeros(count)
        self.terminated, self.truncated, self.ignored, self.starts = np.zeros((4, count), dtype=bool)
        self.episodes: list[Episode] = []
        self._returns, self._lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
        self._steps = 0
        self._reset("environments")

    def _autoreset_mode(self, count: int) -> AutoresetMode:
        if self._vector.num_envs != count:
            raise ConfigError(
                f"make_vector: made {self._vector.num_envs} environments, asked for {count}; make as many"
            )
        mode = self._vector.metadata.get("autoreset_mode")
        if mode is None:
            raise ConfigError(
                f'make_vector: {self._vector} does not say when it resets; set metadata["autoreset_mode"] to a '
                "gymnasium.vector.AutoresetMode"
            )
        return AutoresetMode(mode)

    def _reset(self, purpose: str) -> None:
        seed = hash_seed(self.seed, purpose, self.indices[0], len(self.indices), self._steps)
        self.observations = self._vector.reset(seed=seed)[0]
        self.starts[:] = True

    def step(self, actions: Array) -> None:
        """Step all environments with their actions, ``[E]`` of integers or ``[E, ...]``."""
        if self._mode is AutoresetMode.NEXT_STEP:
            np.logical_or(self.terminated, self.truncated, out=self.ignored)
        self.observations, rewards, terminated, truncated, info = self._vector.step(actions)
        self.rewards[:], self.terminated[:], self.truncated[:] = rewards, terminated, truncated
        self.starts[:] = self.ignored
        self._steps += 1
        self._returns += self.rewards
        self._lengths += ~self.ignored
        self.episodes = []
        ended = self.terminated | self.truncated
        if ended.any():
            self._end_episodes(np.flatnonzero(ended).tolist(), info)

    def _end_episodes(self, ended: list[int], info: dict[str, Any]) -> None:
        same_step = self._mode is AutoresetMode.SAME_STEP
        last = info["final_obs"] if same_step else self.observations
        for i in ended:
            row = {key: part[i] for key, part in last.items()} if isinstance(last, dict) else last[i]
            write_row(self.final_observations, i, row)
            self.episodes.append(Episode(self.indices[i], float(self._returns[i]), int(self._lengths[i]), {}))
        self._returns[ended], self._lengths[ended] = 0.0, 0
        if self._mode is AutoresetMode.DISABLED:
            mask = self.terminated | self.truncated
            self.observations = self._vector.reset(options={"reset_mask": mask})[0]
        if self._mode is not AutoresetMode.NEXT_STEP:
            self.starts[ended] = True

    def item_state_dict(self) -> dict[str, Any]:
        """The state of this process's environments, as one item."""
        state = {name: to_stored(getattr(self, name), name) for name in _STORED}
        vector: Any = self._vector
        return {self._item: state | {"vector": None if self.inexact else environment_state(vector)}}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Go on with the stored episodes; :class:`ConfigError` on another number of processes."""
        if len(items) != self._processes:
            raise ConfigError(
                f"devices: {self._processes} processes, but those stored were stepped by {len(items)}, each its own "
                f"as a whole; resume on {len(items)}, or train with EnvironmentVector"
            )
        item = items[self._item]
        self._steps = item["_steps"]
        if item["vector"] is None or self.inexact:
            self.terminated[:] = self.truncated[:] = False
            self._returns[:], self._lengths[:] = 0.0, 0
            self._reset("resumed")
            return
        vector: Any = self._vector
        restore_environment_(vector, item["vector"])
        for name in _STORED:
            setattr(self, name, from_stored(item[name]))

    def close(self) -> None:
        """Close the vector."""
        self._vector.close()


_STORED = ("observations", "terminated", "truncated", "starts", "_returns", "_lengths", "_steps")


def _why_inexact(make_vector: Callable[[int], Vector], count: int, *, steps: int = 64) -> str | None:
    """Why the state of such a vector cannot be stored; found by trying, as for a single environment."""
    one: Any = make_vector(count)
    other: Any = make_vector(count)
    try:
        unknown = unknown_layer(one)
        if unknown is not None:
            return f"the state of {unknown} is not known; train with EnvironmentVector"
        one.reset(seed=1)
        other.reset(seed=2)
        one.action_space.seed(0)
        actions = [one.action_space.sample() for _ in range(2 * steps)]
        for action in actions[:steps]:
            _stepped(one, action)
        restore_environment_(other, environment_state(one))
        for action in actions[steps:]:
            expected, actual = (as_bytes(_stepped(vector, action)) for vector in (one, other))
            if expected != actual:
                return f"{type(one).__name__} differs after a restore"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        one.close()
        other.close()
    return None


@contextmanager
def _stop_signals_ignored() -> Iterator[None]:
    """Here, and for good in every process that is started here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _close(vector: Any) -> None:
    if vector() is not None:
        vector().close()


def _stepped(vector: Vector, action: Any) -> tuple[Any, ...]:
    """Observations, rewards and ends of a step, and then the reset that some vectors leave to their user."""
    observations, rewards, terminated, truncated, _ = vector.step(action)
    mask = terminated | truncated
    if vector.metadata.get("autoreset_mode") is AutoresetMode.DISABLED and mask.any():
        observations = vector.reset(options={"reset_mask": mask})[0]
    return observations, rewards, terminated, truncated
