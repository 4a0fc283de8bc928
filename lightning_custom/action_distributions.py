"""Distributions over actions: sampled in NumPy where environments are stepped, scored in torch where policies learn.

A policy gives ``size`` numbers for each observation, the distribution's parameters. Randomness comes in as ``noise``,
drawn for all environments of all processes at once, so that their number does not change it. Shapes: B samples,
P parameters, D dimensions of an action.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lightning_custom.environments.arrays import Array
from lightning_custom.errors import ConfigError


class ActionDistribution(ABC):
    """A family of distributions over the actions of a space."""

    size: int
    """Numbers that a policy gives for each observation."""

    @abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Array:
        """What :meth:`sample` needs for ``shape`` actions, ``[*shape, ...]``, float64."""

    @abstractmethod
    def sample(self, parameters: Array, noise: Array) -> Array:
        """An action ``[B, ...]`` for each row of ``parameters [B, P]``, a function of ``noise [B, ...]``."""

    @abstractmethod
    def mode(self, parameters: Array) -> Array:
        """The most probable action ``[B, ...]``."""

    @abstractmethod
    def log_probability_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Of each of ``actions [B, ...]`` under ``parameters [B, P]``: two ``[B]``, in nats."""

    def to_environment(self, actions: Array) -> Array:
        """What the environment is given for ``actions``."""
        return actions


class Categorical(ActionDistribution):
    """One of ``n`` actions; the parameters are logits."""

    def __init__(self, space: spaces.Discrete) -> None:
        self.size, self._start = int(space.n), int(space.start)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Array:
        """Gumbel's, one an action."""
        return _gumbel((*shape, self.size), generator)

    def sample(self, parameters: Array, noise: Array) -> Array:
        """The largest logit with its noise, which is a draw from the softmax (Maddison et al. 2014, section 2)."""
        return self.mode(parameters + noise)

    def mode(self, parameters: Array) -> Array:
        """The largest logit's."""
        mode: Array = parameters.argmax(1)
        return mode

    def log_probability_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """From the softmax of the logits."""
        logs = torch.log_softmax(parameters, 1)
        return logs.gather(1, actions.unsqueeze(1)).squeeze(1), -(logs.exp() * logs).sum(1)

    def to_environment(self, actions: Array) -> Array:
        """Counted from the space's start."""
        return actions + self._start if self._start else actions


class SeveralCategorical(ActionDistribution):
    """Several choices at once, independent of each other; the parameters are their logits one after another."""

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        self._sizes = [int(n) for n in space.nvec.ravel()]
        self._start, self._shape, self.size = np.asarray(space.start), space.shape, sum(self._sizes)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Array:
        """Gumbel's, one an action of each choice."""
        return _gumbel((*shape, self.size), generator)

    def sample(self, parameters: Array, noise: Array) -> Array:
        """Each choice's largest logit with its noise."""
        return self.mode(parameters + noise)

    def mode(self, parameters: Array) -> Array:
        """Each choice's largest logit."""
        return np.stack([part.argmax(1) for part in self._split(parameters)], 1)

    def _split(self, parameters: Array) -> list[Array]:
        return np.split(parameters, np.cumsum(self._sizes)[:-1], axis=1)

    def log_probability_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over choices."""
        total = entropy = parameters.new_zeros(len(parameters))
        for part, action in zip(parameters.split(self._sizes, 1), actions.unbind(1), strict=True):
            logs = torch.log_softmax(part, 1)
            total = total + logs.gather(1, action.unsqueeze(1)).squeeze(1)
            entropy = entropy - (logs.exp() * logs).sum(1)
        return total, entropy

    def to_environment(self, actions: Array) -> Array:
        """In the shape of the space, counted from its start."""
        return actions.reshape(-1, *self._shape) + self._start


class SeveralBernoulli(ActionDistribution):
    """Bits, independent of each other; the parameters are their logits."""

    def __init__(self, space: spaces.MultiBinary) -> None:
        self._shape, self.size = space.shape, math.prod(space.shape)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Array:
        """Uniform numbers, one a bit."""
        return _uniform((*shape, self.size), generator)

    def sample(self, parameters: Array, noise: Array) -> Array:
        """1 where the uniform number is below the bit's probability."""
        actions: Array = (noise * (1 + np.exp(-parameters.astype(np.float64))) < 1).astype(np.int8)
        return actions

    def mode(self, parameters: Array) -> Array:
        """1 where the logit is positive."""
        mode: Array = (parameters > 0).astype(np.int8)
        return mode

    def log_probability_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over bits."""
        one, zero = torch.nn.functional.logsigmoid(parameters), torch.nn.functional.logsigmoid(-parameters)
        total = torch.where(actions.bool(), one, zero).sum(1)
        return total, -(one.exp() * one + zero.exp() * zero).sum(1)

    def to_environment(self, actions: Array) -> Array:
        """In the shape of the space."""
        return actions.reshape(-1, *self._shape)


class Gaussian(ActionDistribution):
    """Independent normal numbers; the parameters are ``D`` means, then ``D`` logarithms of standard deviations.

    An action is cut to the bounds of the space on its way to the environment; its probability is that of the number
    before the cut.
    """

    def __init__(self, space: spaces.Box) -> None:
        self._low, self._high, self._shape = space.low, space.high, space.shape
        self._dimensions = math.prod(space.shape)
        self.size = 2 * self._dimensions

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Array:
        """Standard normal numbers."""
        return torch.randn(*shape, self._dimensions, generator=generator, dtype=torch.float64).numpy()

    def sample(self, parameters: Array, noise: Array) -> Array:
        """The mean and the scaled noise."""
        mean, log_std = np.split(parameters, 2, axis=1)
        actions: Array = mean + np.exp(log_std) * noise.astype(parameters.dtype)
        return actions

    def mode(self, parameters: Array) -> Array:
        """The mean."""
        mean: Array = parameters[:, : self._dimensions]
        return mean

    def log_probability_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over dimensions."""
        mean, log_std = parameters.chunk(2, 1)
        squares = ((actions - mean) * torch.exp(-log_std)).square()
        total = -(0.5 * squares + log_std + 0.5 * math.log(2 * math.pi)).sum(1)
        return total, (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(1)

    def to_environment(self, actions: Array) -> Array:
        """In the shape of the space and cut to its bounds."""
        return np.clip(actions.reshape(-1, *self._shape), self._low, self._high)


def action_distribution(space: gym.Space[Any]) -> ActionDistribution:
    """The usual distribution over ``space``; :class:`ConfigError` where there is none.

    >>> action_distribution(spaces.Discrete(3)).sample(np.zeros((2, 3)), np.eye(3)[[0, 2]]).tolist()
    [0, 2]
    """
    if isinstance(space, spaces.Discrete):
        return Categorical(space)
    if isinstance(space, spaces.MultiDiscrete):
        return SeveralCategorical(space)
    if isinstance(space, spaces.MultiBinary):
        return SeveralBernoulli(space)
    if isinstance(space, spaces.Box):
        return Gaussian(space)
    raise ConfigError(f"make_env: actions are in {space}; wrap the environment so that they are one array")


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Array:
    return torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Array:
    # Where a uniform number is 0 this is -inf: that action is not drawn.
    return torch.rand(*shape, generator=generator, dtype=torch.float64).log_().neg_().log_().neg_().numpy()
