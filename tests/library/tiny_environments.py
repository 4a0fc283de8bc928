"""Environments small enough to know by hand, and runs of vectors as plain containers."""

import io
import random
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from lightning_custom.state import to_plain


def process(rank=0, processes=1):
    """What the environment layer asks of Fabric, for one of several processes."""
    return SimpleNamespace(global_rank=rank, world_size=processes, device=torch.device("cpu"))


class Countdown(gym.Env[Any, Any]):
    """Ends after ``length`` steps: terminated, truncated, or both. The observation is [index, episode, step]."""

    def __init__(self, index=0, length=3, end="terminated"):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = spaces.Discrete(4)
        self.index, self.length, self.end, self.episode = index, length, end, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        self.count += 1
        ends = self.count == self.length
        terminated, truncated = ends and self.end != "truncated", ends and self.end != "terminated"
        return self._observation(), 10.0 * self.count + action, terminated, truncated, {"last": ends}

    def _observation(self):
        return np.array([self.index, self.episode, self.count], dtype=np.float64)


class Drift(gym.Env[Any, Any]):
    """A random walk of a class that the library does not know; an episode is at most 9 steps."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.count = self.np_random.normal(size=2), 0
        return self.place.astype(np.float32), {}

    def step(self, action):
        self.place = self.place + action + self.noise()
        self.count += 1
        terminated = bool(self.place[0] > 2.5)
        return self.place.astype(np.float32), float(self.place.sum()), terminated, self.count == 9, {}

    def noise(self):
        return self.np_random.normal(size=2)


class OutsideNoise(Drift):
    """Not deterministic: its noise is not drawn from the environment's generator."""

    def noise(self):
        return np.array([random.random(), 0.0])


class Level(Drift):
    """Deterministic, but what it does depends on the episodes before."""

    level = 0

    def reset(self, *, seed=None, options=None):
        self.level += 1
        return super().reset(seed=seed, options=options)

    def noise(self):
        return super().noise() * self.level


class LevelWithState(Level):
    """Tells its own state, and keeps a reference to the generator."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self.generator = self.np_random
        return result

    def noise(self):
        return self.generator.normal(size=2) * self.level

    def get_state(self):
        return {"place": self.place, "count": self.count, "level": self.level}

    def set_state(self, state):
        self.place, self.count, self.level = state["place"], state["count"], state["level"]


class LevelWithObject(LevelWithState):
    """Tells a state that no checkpoint can hold."""

    def get_state(self):
        return {"all": object()}


class Mixed(gym.Env[Any, Any]):
    """Dict observations, and several numbers an action, which it repeats in the observation; 4 steps an episode."""

    def __init__(self):
        self.observation_space = spaces.Dict(
            action=spaces.MultiDiscrete([5, 3]), picture=spaces.Box(0, 255, (2, 2), np.uint8), count=spaces.Discrete(9)
        )
        self.action_space = spaces.MultiDiscrete([5, 3])
        self.kept = np.zeros(2, np.int64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action):
        before, self.kept = self.kept.copy(), action
        self.count += 1
        return self._observation() | {"action": before}, 0.0, False, self.count == 4, {}

    def _observation(self):
        picture = np.full((2, 2), 50 * self.count, np.uint8)
        return {"action": np.zeros(2, np.int64), "picture": picture, "count": self.count}


def random_actions(vector, steps, seed=0):
    """Actions for ``steps`` of a vector: a list of arrays ``[E, ...]``."""
    space = vector.action_space
    space.seed(seed)
    count = len(vector.rewards)
    return [np.array([space.sample() for _ in range(count)]) for _ in range(steps)]


def play(vector, actions):
    """All that a vector shows at each step, as plain containers."""
    return [_shown(vector, action) for action in actions]


def _shown(vector, action):
    vector.step(action)
    ended, final = vector.terminated | vector.truncated, vector.final_observations
    names = ("observations", "rewards", "terminated", "truncated", "ignored", "starts")
    shown = {name: getattr(vector, name) for name in names}
    shown["final"] = {key: array[ended] for key, array in final.items()} if isinstance(final, dict) else final[ended]
    shown["episodes"] = [tuple(episode)[:3] for episode in vector.episodes]
    return to_plain(shown, "shown")


def stored(items):
    """Items written and read as a checkpoint does."""
    buffer = io.BytesIO()
    torch.save(to_plain(items, "items"), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Counted(gym.Env[Any, Any]):
    """Its state is the number of steps since the reset."""

    count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


class Pays(Counted):
    """A reward of 1 a step, whatever is done; after two steps an episode is cut, or ends. Two observations."""

    def __init__(self, end, action_space):
        self.observation_space, self.action_space, self.end = spaces.Box(0, 1, (2,), np.float64), action_space, end

    def step(self, action):
        self.count += 1
        ends = self.count == 2
        return self._observation(), 1.0, ends and self.end == "terminated", ends and self.end == "truncated", {}

    def _observation(self):
        return np.eye(2)[self.count % 2]
