"""Several environments stepped in turn in one process, whose state is exact and belongs to no process."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from lightning.fabric import Fabric

from lightning_custom.distributed import share
from lightning_custom.environments.arrays import (
    Array,
    Observations,
    check_spaces,
    each_action,
    empty_observations,
    row,
    write_row,
)
from lightning_custom.environments.layers import Environment, environment_state, restore_environment_
from lightning_custom.environments.plain import from_stored, to_stored
from lightning_custom.environments.verified import StateMethod, find_method, prepared
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.loop import hash_seed


class Episode(NamedTuple):
    """An episode that has ended."""

    environment: int
    """The index of its environment, among all of the run."""
    episodic_return: float
    """The sum of its rewards, not discounted."""
    length: int
    """Steps."""
    info: dict[str, Any]
    """What the environment said at the last step."""


class Environments(Protocol):
    """What is read of several environments after a step: of ``EnvironmentVector`` and ``BatchedEnvironments``."""

    observations: Observations
    final_observations: Observations
    rewards: Array
    terminated: Array
    truncated: Array
    ignored: Array
    episodes: list[Episode]


class EnvironmentVector:
    """``num_envs`` environments, of which this process steps its contiguous share ``E``.

        envs = EnvironmentVector(fabric, make_env, config.num_envs, seed=config.seed)       # a field of the state
        ...
        envs.step(policy(envs.observations))
        bootstrap = value(envs.final_observations[envs.truncated])

    ``make_env(index) -> gymnasium.Env`` gets the index among all environments; so does the seed, so that N processes
    play the episodes of one. It is called a few times more, to find how the state is taken.

    Arrays are written over at every step: copy what you keep. An environment whose episode ends is reset in the same
    step: :attr:`observations` holds the first observation of the next episode and :attr:`final_observations` the last
    of the one that ended.

    The checks of gymnasium (order of calls, passive checker) run when the method of taking the state is found, and
    are left out afterwards; an outermost time limit is counted here. :class:`ConfigError` for observations or actions
    that are not arrays. Not thread-safe.
    """

    def __init__(self, fabric: Fabric, make_env: Callable[[int], Environment], num_envs: int, *, seed: int) -> None:
        count = share(num_envs, fabric, "num_envs")
        self.num_envs, self.seed = num_envs, seed
        self.indices = range(fabric.global_rank * count, (fabric.global_rank + 1) * count)
        """The environments of this process, among all."""
        self._environments: list[Environment] = []
        self._limits: list[float] = []
        self._methods: list[StateMethod] = []
        known: dict[str, StateMethod] = {}
        for index in self.indices:
            self._add(make_env, index, known)
        self.observation_space = self._environments[0].observation_space
        self.action_space = self._environments[0].action_space
        self._check_spaces()

        self.observations = empty_observations(self.observation_space, count)
        """What the next actions answer to."""
        self.final_observations = empty_observations(self.observation_space, count)
        """The last of the episode, where one ended in the last step; what is there else means nothing."""
        self.rewards = np.zeros(count)
        self.terminated = np.zeros(count, dtype=bool)
        self.truncated = np.zeros(count, dtype=bool)
        self.ignored = np.zeros(count, dtype=bool)
        """Whose action was ignored in the last step: never here; see ``BatchedEnvironments``."""
        self.episodes: list[Episode] = []
        """Those that ended in the last step, in order of environment."""
        self._returns, self._lengths = np.zeros(count), [0] * count
        self._episodes_begun = [1] * count

        self._steps = [env.step for env in self._environments]
        self._resets = [env.reset for env in self._environments]
        for i, index in enumerate(self.indices):
            write_row(self.observations, i, self._resets[i](seed=hash_seed(seed, "environment", index))[0])

    def _add(self, make_env: Callable[[int], Environment], index: int, known: dict[str, StateMethod]) -> None:
        env = make_env(index)
        kind = str(env)  # the classes of the whole stack, and the registered name
        if kind not in known:
            known[kind] = find_method(lambda: make_env(index))
        env, limit = lean(env)
        self._environments.append(prepared(env, known[kind]))
        self._limits.append(limit)
        self._methods.append(known[kind])

    def _check_spaces(self) -> None:
        check_spaces(self.observation_space, self.action_space)
        for index, env in zip(self.indices, self._environments, strict=True):
            same = env.observation_space == self.observation_space and env.action_space == self.action_space
            if not same:
                raise ConfigError(
                    f"make_env: environment {index} has other spaces than environment {self.indices[0]}: "
                    f"{env.observation_space}, {env.action_space}; make all alike"
                )

    @property
    def inexact(self) -> str | None:
        """Why a resumed run starts new episodes instead of going on with the old; None where it goes on exactly."""
        reasons = [method.reason for method in self._methods if method.name == "reset"]
        return reasons[0] if reasons else None

    @property
    def starts(self) -> Array:
        """Whether each of :attr:`observations` is the first of an episode: bool ``[E]``."""
        return np.array([length == 0 for length in self._lengths])

    def step(self, actions: Array) -> None:
        """Step every environment with its action, ``[E]`` of integers or ``[E, ...]``, and reset what ends."""
        if len(actions) != len(self._steps):
            raise ValueError(f"actions: {len(actions)}, for {len(self._steps)} environments; give one for each")
        self.terminated[:] = self.truncated[:] = False
        self.episodes = []
        observations, lengths, limits, rewards = self.observations, self._lengths, self._limits, []
        is_dict = isinstance(observations, dict)
        ended = []
        i = -1
        try:
            for step, action in zip(self._steps, each_action(actions), strict=True):
                i += 1
                observation, reward, terminated, truncated, info = step(action)
                rewards.append(reward)
                lengths[i] += 1
                if terminated or truncated or lengths[i] >= limits[i]:
                    self.terminated[i] = terminated
                    self.truncated[i] = truncated or lengths[i] >= limits[i]
                    ended.append((i, info))
                    write_row(self.final_observations, i, observation)
                    observation = self._resets[i]()[0]
                if is_dict:
                    write_row(observations, i, observation)
                else:
                    observations[i] = observation  # type: ignore[index]
        except Exception as error:
            error.add_note(f"in environment {self.indices[max(i, 0)]}")
            raise
        self.rewards[:] = rewards
        self._returns += self.rewards
        for i, info in ended:
            self._end_episode(i, info)

    def _end_episode(self, i: int, info: dict[str, Any]) -> None:
        self.episodes.append(Episode(self.indices[i], float(self._returns[i]), self._lengths[i], info))
        self._returns[i], self._lengths[i] = 0.0, 0
        self._episodes_begun[i] += 1

    def item_state_dict(self) -> dict[str, Any]:
        """The state of each environment of this process, under its index among all."""
        return {environment_item(index): self._item(i) for i, index in enumerate(self.indices)}

    def _item(self, i: int) -> dict[str, Any]:
        method, env = self._methods[i].name, self._environments[i]
        return {
            "method": method,
            "environment": None if method == "reset" else environment_state(env),
            "observation": to_stored(row(self.observations, i), "observation"),
            "return": float(self._returns[i]),
            "length": self._lengths[i],
            "episodes_begun": self._episodes_begun[i],
        }

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Go on with the episodes of ``items``, which hold every environment of the run.

        :class:`ConfigError` for another number of environments, :class:`CheckpointError` where one does not fit.
        """
        check_number(items, self.num_envs)
        for i, index in enumerate(self.indices):
            try:
                self._load_item(i, items[environment_item(index)])
            except CheckpointError as error:
                raise CheckpointError(f"environment {index}: {error}") from error

    def _load_item(self, i: int, item: dict[str, Any]) -> None:
        method = self._methods[i].name
        if method != item["method"]:
            raise CheckpointError(
                f"its state was stored {_WORDS[item['method']]} and is now taken {_WORDS[method]} "
                f"({self._methods[i].reason or 'it can be'}); use the versions of the run that stored it"
            )
        self._episodes_begun[i] = item["episodes_begun"]
        if method == "reset":
            seed = hash_seed(self.seed, "resumed", self.indices[i], item["episodes_begun"], item["length"])
            write_row(self.observations, i, self._resets[i](seed=seed)[0])
            self._returns[i], self._lengths[i] = 0.0, 0
            return
        restore_environment_(self._environments[i], item["environment"])
        write_row(self.observations, i, from_stored(item["observation"]))
        self._returns[i], self._lengths[i] = item["return"], item["length"]

    def close(self) -> None:
        """Close every environment."""
        for env in self._environments:
            env.close()


_WORDS = {"layers": "by its fields", "replay": "by replay", "reset": "not at all"}


def environment_item(index: int) -> str:
    """The name of an environment's item."""
    return f"environment-{index:05d}"


def check_number(items: dict[str, Any], num_envs: int) -> None:
    """:class:`ConfigError` unless there is an item for each of ``num_envs`` environments."""
    if len(items) != num_envs:
        raise ConfigError(f"num_envs: {num_envs}, but the checkpoint holds {len(items)} environments; use {len(items)}")


def lean(env: Environment) -> tuple[Environment, float]:
    """``env`` without gymnasium's checks and without an outermost time limit, and that limit in steps.

    The three cost a third of a step of CartPole.
    """
    limit = float("inf")
    checks = (gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker)
    while type(env) in checks or (type(env) is gym.wrappers.TimeLimit and limit == float("inf")):
        if isinstance(env, gym.wrappers.TimeLimit):
            limit = env._max_episode_steps
        env = env.env  # type: ignore[attr-defined]
    layer = env
    while isinstance(layer, gym.Wrapper):
        while type(layer.env) in checks:
            layer.env = layer.env.env  # type: ignore[attr-defined]
        layer = layer.env
    return env, limit
