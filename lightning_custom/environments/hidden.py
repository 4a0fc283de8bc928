"""Environments that show less than their state: tasks for a memory."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from lightning_custom.environments.arrays import Array
from lightning_custom.environments.layers import Environment
from lightning_custom.errors import ConfigError


class HiddenComponents(gym.ObservationWrapper[Any, Any, Any]):
    """Leaves ``components`` out of observations that are vectors; it has no state of its own.

    Without the velocities of CartPole, its components 1 and 3, no single observation says what to do.
    """

    def __init__(self, env: Environment, components: Sequence[int]) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ConfigError(
                f"hide: {list(components)}, but observations are in {space}; only a vector has components; give []"
            )
        size = space.shape[0]
        self._shown = [i for i in range(size) if i not in components]
        if not self._shown or not all(0 <= i < size for i in components):
            raise ConfigError(f"hide: {list(components)}, of components 0 to {size - 1}; name some of them, not all")
        self.observation_space = spaces.Box(space.low[self._shown], space.high[self._shown], dtype=space.dtype)

    def observation(self, observation: Array) -> Array:
        """What is left."""
        shown: Array = observation[self._shown]
        return shown

    def get_state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
