"""The state of any deterministic environment: its random generator at the reset, and the actions since."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np

from lightning_custom.environments.layers import Environment
from lightning_custom.errors import CheckpointError


class Replayed(gym.Wrapper[Any, Any, Any, Any]):
    """Records what an environment's episode was made of; a restore resets and plays it again.

    Right where an episode is a function of the generator, of what :meth:`reset` was given, and of the actions. What
    lives on from one episode to the next (running statistics, a level that rises) is not, which the check in
    :mod:`lightning_custom.environments.verified` is there to find. Memory and the time of a restore grow with the
    length of the episode.
    """

    holds_all_below = True

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self._reset: dict[str, Any] = {}
        self._actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and begin a new record."""
        base = self.env.unwrapped
        generator = None if seed is not None else base.np_random.bit_generator.state
        self._reset = {"seed": seed, "options": options, "generator": generator}
        self._actions = []
        renew_world_(base)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment and record the action."""
        # The caller may use its array again.
        self._actions.append(action if isinstance(action, int) else np.copy(action))
        return self.env.step(action)

    def get_state(self) -> dict[str, Any]:
        """The record of the episode so far."""
        whole_numbers = all(isinstance(action, int) for action in self._actions)
        return self._reset | {"actions": np.array(self._actions), "whole_numbers": whole_numbers}

    def set_state(self, state: dict[str, Any]) -> None:
        """Play the episode of a record; :class:`CheckpointError` where it ends before the record does."""
        base, actions = self.env.unwrapped, state["actions"]
        if state["seed"] is None:
            base.np_random.bit_generator.state = state["generator"]
        self.reset(seed=state["seed"], options=state["options"])
        for i, action in enumerate(actions.tolist() if state["whole_numbers"] else actions, start=1):
            _, _, terminated, truncated, _ = self.step(action)
            if (terminated or truncated) and i < len(actions):
                raise CheckpointError(
                    f"an episode of {type(base).__name__} that was stored after {len(actions)} actions ends after {i} "
                    "when played again; make the environment that was stored"
                )


def renew_world_(env: Any) -> None:
    """Take what is left of the episodes before out of ``env``, whose next call is a reset."""
    # Box2D keeps the order in which it looks for contacts, so that in the same world an episode depends on all before
    # it. LunarLander makes a new one for each episode; BipedalWalker and CarRacing do not.
    base = env.unwrapped
    if type(base).__module__.startswith("gymnasium.envs.box2d."):
        base._destroy()
        base.world = sys.modules["Box2D"].b2World(gravity=base.world.gravity)
