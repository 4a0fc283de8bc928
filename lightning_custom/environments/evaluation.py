"""Whole episodes, each a function of its seed: to score a policy by, or to learn from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.environments.arrays import Array, Observations, empty_observations, write_row
from lightning_custom.environments.layers import Environment
from lightning_custom.environments.vector import lean
from lightning_custom.loop import hash_seed

Act = Callable[[Observations, Sequence[int], int], Array]
"""``(observations [E, ...], the episodes they are of, steps since their start) -> actions [E, ...]``."""
MakeEnv = Callable[[int], Environment]

_AT_ONCE = 64


class Transition(NamedTuple):
    """One step of each of the episodes that are still going on."""

    episodes: Sequence[int]
    """Which episodes, by their place in the seeds."""
    observations: Observations
    """What was acted on, ``[E, ...]``; written over at the next step."""
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    following: Observations
    """What was seen next; written over at the next step."""


def play_episodes(make_env: MakeEnv, act: Act, seeds: Sequence[int]) -> Iterator[Transition]:
    """Play one episode for each of ``seeds``, together, and yield each step of those that have not ended.

    An environment is made for each and closed at the end; its episode depends on its seed and on the actions alone.
    """
    stacks = [lean(make_env(index)) for index in range(len(seeds))]
    envs, limits = [env for env, _ in stacks], [limit for _, limit in stacks]
    space, going = envs[0].observation_space, list(range(len(seeds)))
    observations = empty_observations(space, len(seeds))
    for i, (env, seed) in enumerate(zip(envs, seeds, strict=True)):
        write_row(observations, i, env.reset(seed=seed)[0])
    try:
        for steps in count():
            actions = act(observations, going, steps)
            following, found = empty_observations(space, len(going)), []
            for i, (episode, action) in enumerate(zip(going, _each(actions), strict=True)):
                observation, reward, *ends, _ = envs[episode].step(action)
                write_row(following, i, observation)
                found.append((float(reward), ends[0], ends[1] or steps + 1 >= limits[episode]))
            rewards, terminated, truncated = (np.array(column) for column in zip(*found, strict=True))
            yield Transition(going, observations, actions, rewards, terminated, truncated, following)
            goes_on = ~(terminated | truncated)
            going = [episode for episode, one in zip(going, goes_on, strict=True) if one]
            if not going:
                return
            observations = rows_of(following, goes_on)
    finally:
        for env in envs:
            env.close()


def _each(actions: Array) -> list[Any]:
    return actions.tolist() if actions.ndim == 1 and actions.dtype.kind in "iu" else list(np.array(actions))


def rows_of(observations: Observations, rows: Any) -> Observations:
    """Those of ``observations`` that ``rows``, a mask or indices, names."""
    if isinstance(observations, dict):
        return {key: part[rows] for key, part in observations.items()}
    kept: Array = observations[rows]
    return kept


def episodic_returns(
    fabric: Fabric, make_env: MakeEnv, act: Callable[[Observations], Array], number: int, *, seed: int
) -> Tensor:
    """The undiscounted return of each of ``number`` episodes, ``[number]`` float64, divided among the processes.

    ``act`` gives what the environment takes. Every call plays the same episodes; each counts once, however long it is:
    the mean of those that happen to end first would be that of short ones.
    """
    own = torch.arange(number).tensor_split(fabric.world_size)[fabric.global_rank].tolist()
    returns = np.zeros(len(own))
    for start in range(0, len(own), _AT_ONCE):
        part = own[start : start + _AT_ONCE]
        seeds = [hash_seed(seed, "evaluation", episode) for episode in part]
        for step in play_episodes(make_env, lambda observations, *_: act(observations), seeds):
            np.add.at(returns, [start + episode for episode in step.episodes], step.rewards)
    return gather_shares(torch.from_numpy(returns).to(_device(fabric)), fabric).cpu()


def _device(fabric: Fabric) -> torch.device:
    # MPS has no float64.
    return torch.device("cpu") if fabric.device.type == "mps" else fabric.device


def mean_and_interval(returns: Tensor) -> tuple[float, float]:
    """The mean of ``returns`` ``[N]`` and half the width of its 95% interval, by the normal distribution."""
    interval = 1.96 * float(returns.std()) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    return float(returns.mean()), interval
