"""Whole episodes, each a function of its seed: to score a policy by, or to learn from."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.environments.arrays import (
    Array,
    Observations,
    concatenated,
    each_action,
    empty_observations,
    rows_of,
    write_row,
)
from lightning_custom.environments.layers import Environment
from lightning_custom.environments.replay import renew_world_
from lightning_custom.environments.vector import Episode, lean
from lightning_custom.loop import hash_seed

Act = Callable[[Observations, Sequence[int], int], Array]
"""``(observations [E, ...], the episodes they are of, steps since their start) -> actions [E, ...]``."""
MakeEnv = Callable[[int], Environment]


@runtime_checkable
class EpisodeActor(Protocol):
    """Acts by what it has seen of an episode so far, where a function acts by the observation alone."""

    def in_episodes(self, observations: Observations, episodes: Sequence[int], steps: int) -> Array:
        """As :data:`Act`; 0 steps begin new episodes, all that there are."""
        ...


Actor = Callable[[Observations], Array] | EpisodeActor
"""What plays: ``observations [E, ...] -> actions [E, ...]``, or an :class:`EpisodeActor`."""


def as_act(actor: Actor) -> Act:
    """How ``actor`` plays episodes."""
    return actor.in_episodes if isinstance(actor, EpisodeActor) else lambda observations, *_: actor(observations)


_AT_ONCE = 64
LONGEST = 27_000
"""Steps after which an episode is cut where the environment has no time limit: that of an Atari game."""


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

    An episode depends on its seed and on the actions alone, so there is nothing to store. One that is still going on
    after :data:`LONGEST` steps, without a time limit of its own, is cut as a time limit would, with a warning.
    """

    def __init__(self, make_env: MakeEnv) -> None:
        self._make_env = make_env
        self._envs: dict[int, tuple[Environment, float]] = {}
        self._has_warned = False

    def play(self, act: Act, seeds: Sequence[int], indices: Sequence[int] | None = None) -> Iterator[Transition]:
        """Play an episode for each of ``seeds``, together, and yield each step of those that have not ended.

        Each in the environment of its index in ``indices``, which are all different; by default its place.
        """
        chosen = [self._environment(index) for index in indices or range(len(seeds))]
        envs, limits = [env for env, _ in chosen], [limit for _, limit in chosen]
        space, going = envs[0].observation_space, list(range(len(seeds)))
        observations = empty_observations(space, len(seeds))
        for i, seed in enumerate(seeds):
            renew_world_(envs[i])
            write_row(observations, i, envs[i].reset(seed=seed)[0])
        for steps in count():
            actions = act(observations, going, steps)
            following, found = empty_observations(space, len(going)), []
            for i, (episode, action) in enumerate(zip(going, each_action(actions), strict=True)):
                observation, reward, *ends, _ = envs[episode].step(action)
                write_row(following, i, observation)
                found.append((float(reward), ends[0], ends[1] or steps + 1 >= limits[episode]))
            rewards, terminated, truncated = (np.array(column) for column in zip(*found, strict=True))
            if steps + 1 >= LONGEST:
                truncated |= self._cut(~(terminated | truncated) & ~np.isfinite([limits[i] for i in going]))
            yield Transition(going, observations, actions, rewards, terminated, truncated, following)
            goes_on = ~(terminated | truncated)
            going = [episode for episode, one in zip(going, goes_on, strict=True) if one]
            if not going:
                return
            observations = rows_of(following, goes_on)

    def _environment(self, index: int) -> tuple[Environment, float]:
        if index not in self._envs:
            self._envs[index] = lean(self._make_env(index))
        return self._envs[index]

    def _cut(self, too_long: Array) -> Array:
        if too_long.any() and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"an episode had not ended after {LONGEST:,} steps and was cut; give the environment a time limit "
                "(gymnasium.wrappers.TimeLimit)",
                stacklevel=4,
            )
        return too_long

    def played(
        self,
        draw: Act,
        seeds: Sequence[int],
        to_environment: Callable[[Array], Array],
        indices: Sequence[int] | None = None,
    ) -> "Played":
        """Everything that happens in an episode for each of ``seeds``, with actions from ``draw``.

        ``to_environment`` makes what the environment takes of an action; ``indices`` are as for :meth:`play`.
        """
        drawn: list[Array] = []

        def act(observations: Observations, episodes: Sequence[int], steps: int) -> Array:
            drawn.append(draw(observations, episodes, steps))
            return to_environment(drawn[-1])

        steps = list(self.play(act, seeds, indices))
        episode_of = np.concatenate([step.episodes for step in steps])
        rewards = np.concatenate([step.rewards for step in steps])
        space = next(iter(self._envs.values()))[0].observation_space
        finals = empty_observations(space, len(seeds))
        truncated = np.zeros(len(seeds), dtype=bool)
        for step in steps:
            for i in np.flatnonzero(step.terminated | step.truncated).tolist():
                truncated[step.episodes[i]] = not step.terminated[i]
                write_row(finals, step.episodes[i], rows_of(step.following, i))
        totals, lengths = np.bincount(episode_of, rewards).tolist(), np.bincount(episode_of).tolist()
        return Played(
            concatenated([step.observations for step in steps]),
            np.concatenate(drawn),
            rewards,
            episode_of,
            truncated,
            finals,
            [Episode(i, totals[i], lengths[i], {}) for i in range(len(seeds))],
        )

    def close(self) -> None:
        """Close the environments."""
        for env, _ in self._envs.values():
            env.close()


def episodic_returns(
    fabric: Fabric,
    make_env: MakeEnv,
    act: Actor,
    number: int,
    *,
    seed: int,
    purpose: str = "evaluation",
) -> Tensor:
    """The undiscounted return of each of ``number`` episodes, ``[number]`` float64, divided among the processes.

    ``act`` gives what the environment takes. Every call of a ``purpose`` plays the same episodes; each counts once,
    however long it is: the mean of those that happen to end first would be that of short ones. Episode ``i`` is played
    in ``make_env(i % 64)``, on any number of processes.
    """
    own = torch.arange(number).tensor_split(fabric.world_size)[fabric.global_rank].tolist()
    returns, player = np.zeros(len(own)), EpisodePlayer(make_env)
    for start in range(0, len(own), _AT_ONCE):
        part = own[start : start + _AT_ONCE]
        seeds = [hash_seed(seed, purpose, episode) for episode in part]
        indices = [episode % _AT_ONCE for episode in part]
        for step in player.play(as_act(act), seeds, indices):
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
