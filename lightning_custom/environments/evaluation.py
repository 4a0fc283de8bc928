"""Whole episodes, each a function of its seed: to score a policy by, or to learn from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.environments.arrays import Array, Observations, each_action, empty_observations, write_row
from lightning_custom.environments.layers import Environment
from lightning_custom.environments.vector import Episode, lean
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
    """What was acted on, ``[E, ...]``."""
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    following: Observations
    """What was seen next."""


class Played(NamedTuple):
    """Whole episodes, their steps ``[S, ...]`` in the order in which they were played."""

    observations: Observations
    """What was acted on."""
    actions: Array
    rewards: Array
    episode_of: Array
    """Which episode each step is of, ``[S]``."""
    truncated: Array
    """Which episodes were cut off and not terminated, bool ``[E]``."""
    final_observations: Observations
    """The last of each episode, ``[E, ...]``."""
    episodes: list[Episode]


class EpisodePlayer:
    """Plays episodes in environments of its own, which it makes when they are needed and keeps.

    An episode depends on its seed and on the actions alone, so there is nothing to store.
    """

    def __init__(self, make_env: MakeEnv) -> None:
        self._make_env = make_env
        self._envs: list[Environment] = []
        self._limits: list[float] = []

    def play(self, act: Act, seeds: Sequence[int]) -> Iterator[Transition]:
        """Play an episode for each of ``seeds``, together, and yield each step of those that have not ended."""
        for index in range(len(self._envs), len(seeds)):
            env, limit = lean(self._make_env(index))
            self._envs.append(env)
            self._limits.append(limit)
        space, going = self._envs[0].observation_space, list(range(len(seeds)))
        observations = empty_observations(space, len(seeds))
        for i, seed in enumerate(seeds):
            write_row(observations, i, self._envs[i].reset(seed=seed)[0])
        for steps in count():
            actions = act(observations, going, steps)
            following, found = empty_observations(space, len(going)), []
            for i, (episode, action) in enumerate(zip(going, each_action(actions), strict=True)):
                observation, reward, *ends, _ = self._envs[episode].step(action)
                write_row(following, i, observation)
                found.append((float(reward), ends[0], ends[1] or steps + 1 >= self._limits[episode]))
            rewards, terminated, truncated = (np.array(column) for column in zip(*found, strict=True))
            yield Transition(going, observations, actions, rewards, terminated, truncated, following)
            goes_on = ~(terminated | truncated)
            going = [episode for episode, one in zip(going, goes_on, strict=True) if one]
            if not going:
                return
            observations = rows_of(following, goes_on)

    def played(self, draw: Act, seeds: Sequence[int], to_environment: Callable[[Array], Array]) -> "Played":
        """Everything that happens in an episode for each of ``seeds``, with actions from ``draw``.

        ``to_environment`` makes what the environment takes of an action.
        """
        drawn: list[Array] = []

        def act(observations: Observations, episodes: Sequence[int], steps: int) -> Array:
            drawn.append(draw(observations, episodes, steps))
            return to_environment(drawn[-1])

        steps = list(self.play(act, seeds))
        episode_of = np.concatenate([step.episodes for step in steps])
        rewards = np.concatenate([step.rewards for step in steps])
        finals = empty_observations(self._envs[0].observation_space, len(seeds))
        truncated = np.zeros(len(seeds), dtype=bool)
        for step in steps:
            for i in np.flatnonzero(step.terminated | step.truncated).tolist():
                truncated[step.episodes[i]] = not step.terminated[i]
                write_row(finals, step.episodes[i], rows_of(step.following, i))
        totals, lengths = np.bincount(episode_of, rewards).tolist(), np.bincount(episode_of).tolist()
        return Played(
            _concatenated([step.observations for step in steps]),
            np.concatenate(drawn),
            rewards,
            episode_of,
            truncated,
            finals,
            [Episode(i, totals[i], lengths[i], {}) for i in range(len(seeds))],
        )

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()


def _concatenated(parts: list[Any]) -> Observations:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


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
    returns, player = np.zeros(len(own)), EpisodePlayer(make_env)
    for start in range(0, len(own), _AT_ONCE):
        part = own[start : start + _AT_ONCE]
        seeds = [hash_seed(seed, "evaluation", episode) for episode in part]
        for step in player.play(lambda observations, *_: act(observations), seeds):
            np.add.at(returns, [start + episode for episode in step.episodes], step.rewards)
    player.close()
    return gather_shares(torch.from_numpy(returns).to(_device(fabric)), fabric).cpu()


def _device(fabric: Fabric) -> torch.device:
    # MPS has no float64.
    return torch.device("cpu") if fabric.device.type == "mps" else fabric.device


def mean_and_interval(returns: Tensor) -> tuple[float, float]:
    """The mean of ``returns`` ``[N]`` and half the width of its 95% interval, by the normal distribution."""
    interval = 1.96 * float(returns.std()) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    return float(returns.mean()), interval
