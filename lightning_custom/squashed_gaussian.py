"""Normal numbers brought into (-1, 1) by the hyperbolic tangent: the policy of soft actor-critic.

A policy gives ``D`` means, then ``D`` logarithms of standard deviations, which are cut to [-20, 2] (Haarnoja et al.
2018's code). Shapes: B samples, D dimensions of an action.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn.functional import softplus

from lightning_custom.environments.arrays import Array
from lightning_custom.errors import ConfigError

SMALLEST, LARGEST = -20.0, 2.0


def squashed_sample(parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions ``[B, D]``, a differentiable function of ``parameters [B, 2 D]``, and their log-probabilities ``[B]``.

    ``noise [B, D]`` is standard normal. Haarnoja et al. 2018, appendix C, eq. 21, with log(1 - tanh(u)^2) written as
    2 (log 2 - u - softplus(-2 u)), which does not underflow.
    """
    mean, log_std = parameters.chunk(2, 1)
    log_std = log_std.clamp(SMALLEST, LARGEST)
    unbounded = mean + log_std.exp() * noise
    normal = -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi))
    slope = 2 * (math.log(2) - unbounded - softplus(-2 * unbounded))
    return torch.tanh(unbounded), (normal - slope).sum(1)


def squashed_action(parameters: Array, noise: Array | None = None) -> Array:
    """Actions ``[B, D]`` for acting; without noise those of the means."""
    mean, log_std = np.split(parameters, 2, axis=1)
    if noise is not None:
        mean = mean + np.exp(np.clip(log_std, SMALLEST, LARGEST)) * noise
    actions: Array = np.tanh(mean)
    return actions


def require_bounds(space: gym.Space[Any]) -> spaces.Box:
    """``space``, a Box with finite bounds; :class:`ConfigError` for anything else."""
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        raise ConfigError(f"make_env: actions are in {space}; soft actor-critic needs a Box with finite bounds")
    return space


def to_bounds(actions: Array, space: spaces.Box) -> Array:
    """``actions [E, D]`` in [-1, 1], stretched to the bounds and shape of ``space``, ``[E, ...]``."""
    shaped = actions.reshape(-1, *space.shape)
    stretched = space.low + (shaped + 1) / 2 * (space.high - space.low)
    # Rounding may leave the bounds by a bit.
    within: Array = np.clip(stretched, space.low, space.high).astype(space.dtype)
    return within
