"""Atari games an episode for each life, as they are trained on."""

from typing import Any

import gymnasium as gym

from lightning_custom.environments.layers import Environment


class LifeEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Ends an episode where a life is lost, and begins the next with the game as it stands (Mnih et al. 2015).

    So a lost life costs what would have come, and the agent still sees all of a game. Such a beginning takes a step
    without an action, and no seed; a new game begins where the last is over.
    """

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self._emulator: Any = env.unwrapped
        self._lives, self._is_over = 0, True

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the game, but for the end of an episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self._lives = self._lives, self._emulator.ale.lives()
        self._is_over = terminated or truncated
        # Some games go on for a while with no life left, and are over then.
        return observation, reward, terminated or 0 < self._lives < before, truncated, info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The next life, or a new game."""
        if not self._is_over:
            observation, _, terminated, truncated, info = self.env.step(0)
            self._is_over = terminated or truncated
        if self._is_over:
            observation, info = self.env.reset(seed=seed, options=options)
        self._lives, self._is_over = self._emulator.ale.lives(), False
        return observation, info

    def get_state(self) -> dict[str, Any]:
        """What it knows of the game."""
        return {"lives": self._lives, "is_over": self._is_over}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take that over."""
        self._lives, self._is_over = state["lives"], state["is_over"]
