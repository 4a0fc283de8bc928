"""Observations and actions of several environments as arrays."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lightning_custom.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]
Observations = Array | dict[str, Array]
"""``[E, ...]`` in the dtype of the observation space; for a Dict space a dict of these."""

_ARRAY_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_spaces(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    """:class:`ConfigError` unless observations are arrays, or a dict of arrays, and actions are arrays."""
    is_dict = isinstance(observation_space, spaces.Dict)
    parts = dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    for key, part in parts.items():
        if not isinstance(part, _ARRAY_SPACES):
            raise ConfigError(
                f"make_env: {f'observation {key!r}' if is_dict else 'the observation'} is in {part}; flatten or leave "
                "it out with a wrapper (gymnasium.wrappers.FlattenObservation, FilterObservation)"
            )
    if not isinstance(action_space, _ARRAY_SPACES):
        raise ConfigError(
            f"make_env: actions are in {action_space}; wrap the environment so that they are one array "
            "(Box, Discrete, MultiDiscrete or MultiBinary)"
        )


def empty_observations(space: gym.Space[Any], count: int) -> Observations:
    """Zeros for ``count`` observations of ``space``."""
    if isinstance(space, spaces.Dict):
        return {key: _zeros(part, count) for key, part in space.spaces.items()}
    return _zeros(space, count)


def _zeros(space: gym.Space[Any], count: int) -> Array:
    return np.zeros((count, *(space.shape or ())), dtype=space.dtype)


def write_row(target: Observations, i: int, observation: Any) -> None:
    """Make ``observation`` the ``i``-th of ``target``."""
    if isinstance(target, dict):
        for key, array in target.items():
            array[i] = observation[key]
    else:
        target[i] = observation


def single_precision(observations: Observations) -> Observations:
    """``observations`` with what is floating-point in float32; no copy of what is already as it should be."""
    if isinstance(observations, dict):
        return {key: array.astype(kept_dtype(array.dtype), copy=False) for key, array in observations.items()}
    return observations.astype(kept_dtype(observations.dtype), copy=False)


def kept_dtype(dtype: Any) -> Any:
    """float32 for a floating-point ``dtype``, else itself."""
    return np.float32 if np.dtype(dtype).kind == "f" else dtype


def rows_of(observations: Observations, rows: Any) -> Observations:
    """Those of ``observations`` that ``rows``, a mask or indices, names."""
    if isinstance(observations, dict):
        return {key: part[rows] for key, part in observations.items()}
    kept: Array = observations[rows]
    return kept


def concatenated(parts: Sequence[Any]) -> Observations:
    """Several batches of observations as one."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def row(observations: Observations, i: int) -> Any:
    """A copy of one observation."""
    if isinstance(observations, dict):
        return {key: array[i].copy() for key, array in observations.items()}
    return observations[i].copy()


def each_action(actions: Array) -> list[Any]:
    """The action of each environment out of ``[E]`` integers or ``[E, ...]``."""
    # Python's integers are faster than NumPy's; of arrays a copy, since an environment may keep its action.
    if actions.ndim == 1 and actions.dtype.kind in "iu":
        integers: list[Any] = actions.tolist()
        return integers
    return list(np.array(actions))
