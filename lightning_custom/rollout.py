"""What a number of environments go through in a number of steps, and its division into minibatches.

Shapes: T steps, E environments of this process, N of all processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.environments.arrays import Array, Observations, concatenated, rows_of, single_precision
from lightning_custom.environments.vector import Environments, Episode

Normalise = Callable[[Any], Any]


class Rollout:
    """``num_steps`` steps of the environments ``envs``, written down as they happen.

        rollout.begin()
        for t in range(num_steps):
            actions = ...(rollout.observe(envs))
            envs.step(actions)
            rollout.record(actions, envs)

    Observations are kept as ``normalise`` makes them, and then also as they were; without it in float32 where they
    are real numbers.
    """

    def __init__(self, num_steps: int, normalise: Normalise | None = None) -> None:
        self.num_steps, self._normalise = num_steps, normalise or single_precision
        self._keeps_raw = normalise is not None
        self.observations: Any = None
        """What was acted on, ``[T, E, ...]``."""
        self.raw_observations: Any = None
        """The same before it was normalised."""
        self.begin()

    def begin(self) -> None:
        """Forget the last rollout."""
        self._t = 0
        self._actions: list[Array] = []
        self._rewards: list[Array] = []
        self._terminated: list[Array] = []
        self._truncated: list[Array] = []
        self._ignored: list[Array] = []
        self._finals: list[Observations] = []
        self.episodes: list[Episode] = []
        """Those that ended in it."""

    def observe(self, envs: Environments) -> Observations:
        """What the next actions answer to, noted down."""
        raw = envs.observations
        seen = self._normalise(raw)
        if self.observations is None:
            self.observations = _room(seen, self.num_steps)
            self.raw_observations = _room(raw, self.num_steps) if self._keeps_raw else self.observations
        _write(self.observations, self._t, seen)
        if self._keeps_raw:
            _write(self.raw_observations, self._t, raw)
        # A copy, since environments write over theirs.
        return rows_of(self.observations, self._t)

    def record(self, actions: Array, envs: Environments) -> None:
        """What ``actions`` led to."""
        self._t += 1
        self._actions.append(actions)
        self._rewards.append(envs.rewards.copy())
        self._terminated.append(envs.terminated.copy())
        self._truncated.append(envs.truncated.copy())
        self._ignored.append(envs.ignored.copy())
        if envs.episodes:
            self.episodes += envs.episodes
            self._finals.append(self._normalise(rows_of(envs.final_observations, envs.terminated | envs.truncated)))

    @property
    def actions(self) -> Array:
        """``[T, E, ...]``."""
        return np.stack(self._actions)

    @property
    def rewards(self) -> Array:
        """``[T, E]``, float64."""
        return np.stack(self._rewards)

    @property
    def terminated(self) -> Array:
        """Bool ``[T, E]``."""
        return np.stack(self._terminated)

    @property
    def truncated(self) -> Array:
        """Bool ``[T, E]``."""
        return np.stack(self._truncated)

    @property
    def ended(self) -> Array:
        """Terminated or truncated."""
        return self.terminated | self.truncated

    @property
    def valid(self) -> Array:
        """Where the action was taken, bool ``[T, E]``; see ``BatchedEnvironments.ignored``."""
        return ~np.stack(self._ignored)

    def all_observations(self, last: Observations) -> Observations:
        """Everything that has a value, one after another: ``[T * E]`` acted on, ``[E]`` last, and where episodes ended.

        ``last`` are the environments' observations after the rollout.
        """
        return concatenated([_merged(self.observations), self._normalise(last), *self._finals])

    def sequences(self, last: Observations) -> tuple[Observations, Observations]:
        """What was acted on and then ``last``, ``[T + 1, E, ...]``; and the last of the F episodes, ``[1, F, ...]``.

        Those are in the order of :attr:`ended`'s true entries.
        """
        finals = self._finals or [rows_of(rows_of(self.observations, 0), slice(0))]
        return concatenated([self.observations, one_step(self._normalise(last))]), one_step(concatenated(finals))


def _room(observations: Observations, steps: int) -> Observations:
    if isinstance(observations, dict):
        return {key: np.empty((steps, *part.shape), part.dtype) for key, part in observations.items()}
    return np.empty((steps, *observations.shape), observations.dtype)


def _write(target: Observations, t: int, observations: Observations) -> None:
    if isinstance(target, dict):
        for key, part in target.items():
            part[t] = observations[key]
    else:
        target[t] = observations


def one_step(observations: Observations) -> Observations:
    """``[E, ...]`` as ``[1, E, ...]``."""
    if isinstance(observations, dict):
        return {key: part[None] for key, part in observations.items()}
    return observations[None]


def _merged(observations: Observations) -> Observations:
    """``[T, E, ...]`` as ``[T * E, ...]``."""
    if isinstance(observations, dict):
        return {key: part.reshape(-1, *part.shape[2:]) for key, part in observations.items()}
    return observations.reshape(-1, *observations.shape[2:])


def gather_environments(fabric: Fabric, values: Any) -> Any:
    """``[T, E, ...]`` of every process side by side, ``[T, N, ...]``, everywhere; tensors, arrays, and dicts of them.

    Every process then computes advantages from the same numbers, and divides the same minibatches: another number of
    processes does the same work. Costs the memory of the whole rollout on each.
    """
    if isinstance(values, Mapping):
        return {key: gather_environments(fabric, part) for key, part in values.items()}
    if fabric.world_size == 1:
        return values
    if isinstance(values, np.ndarray):
        gathered: Tensor = gather_environments(fabric, torch.from_numpy(values).to(fabric.device))
        return gathered.cpu().numpy()
    return gather_shares(values.transpose(0, 1).contiguous(), fabric).transpose(0, 1).contiguous()


def take_rows(values: Any, rows: Tensor | slice) -> Any:
    """``rows`` of each of ``values``: a tensor, or a dict of them."""
    if isinstance(values, Mapping):
        return {key: take_rows(part, rows) for key, part in values.items()}
    return values[rows]


def take_environments(values: Any, environments: Tensor) -> Any:
    """All steps of ``environments``, out of ``[T, N, ...]``: a tensor, or a dict of them."""
    if isinstance(values, Mapping):
        return {key: take_environments(part, environments) for key, part in values.items()}
    return values[:, environments]


def flatten_steps(values: Any) -> Any:
    """``[T, N, ...]`` as ``[T * N, ...]``."""
    if isinstance(values, Mapping):
        return {key: flatten_steps(part) for key, part in values.items()}
    return values.flatten(0, 1)
