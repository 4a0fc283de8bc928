"""Networks of policies and values, for whatever an environment shows and takes."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lightning_custom.action_distributions import ActionDistribution, Gaussian
from lightning_custom.environments.arrays import Array, Observations, empty_observations, single_precision
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating


def require_actor(agent: nn.Module) -> None:
    """:class:`ConfigError` for a module that cannot act apart from its value."""
    if not isinstance(getattr(agent, "actor", None), nn.Module):
        raise ConfigError(f"agent: {type(agent).__name__} has no actor, a module that acts; give an ActorCritic")


def check_outputs(
    act: Callable[[Observations], Array], module: nn.Module, space: gym.Space[Any], size: int, *, name: str
) -> None:
    """:class:`ConfigError` unless ``act``, of ``module``, gives ``size`` numbers for each observation of ``space``."""
    with evaluating(module):
        shape = act(single_precision(_members(space, 2))).shape
    if shape != (2, size):
        raise ConfigError(
            f"{name}: gives numbers of shape {shape} for 2 observations, but the actions need {(2, size)}; "
            "change its last layer"
        )


def _members(space: gym.Space[Any], count: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _members(part, count) for key, part in space.spaces.items()}
    zeros: Any = empty_observations(space, count)
    return zeros + np.asarray(getattr(space, "start", 0), dtype=zeros.dtype)


class ActorCritic(nn.Module):
    """A policy and a value function, apart or on a common trunk.

    ``policy`` gives the action distribution's parameters ``[B, P]``, ``value`` ``[B]`` or ``[B, 1]``; both see the
    observations, or with a ``trunk`` what it makes of them. Calling it gives both.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = trunk, policy, value

    def forward(self, observations: Any) -> tuple[Tensor, Tensor]:
        """Parameters ``[B, P]`` and values ``[B]``."""
        features = observations if self.trunk is None else self.trunk(observations)
        values = self.value(features)
        return self.policy(features), values.squeeze(-1) if values.dim() > 1 else values

    @property
    def actor(self) -> nn.Module:
        """What acting needs: observations to parameters."""
        return self.policy if self.trunk is None else nn.Sequential(self.trunk, self.policy)


class GaussianPolicy(nn.Module):
    """Means from a network, and standard deviations that do not depend on the observation."""

    def __init__(self, mean: nn.Module, dimensions: int, *, log_std: float = 0.0) -> None:
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((dimensions,), log_std))

    def forward(self, observations: Any) -> Tensor:
        """Means and logarithms of standard deviations, ``[B, 2 D]``."""
        mean: Tensor = self.mean(observations)
        return torch.cat([mean, self.log_std.expand_as(mean)], 1)


class Features(nn.Module):
    """Any observation of ``space`` as one vector: pictures and numbers flattened, choices one-hot, dicts in order."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        self.space, self.size = space, spaces.flatdim(space)

    def forward(self, observations: Any) -> Tensor:
        """``[B, size]``."""
        return _as_vectors(observations, self.space)


def _as_vectors(observations: Any, space: gym.Space[Any]) -> Tensor:
    if isinstance(space, spaces.Dict):
        return torch.cat([_as_vectors(observations[key], part) for key, part in space.spaces.items()], 1)
    if isinstance(space, spaces.Discrete):
        return nn.functional.one_hot((observations - space.start).long(), int(space.n)).to(_default())
    if isinstance(space, spaces.MultiDiscrete):
        numbers = (observations - torch.as_tensor(space.start, device=observations.device)).long().flatten(1)
        sizes = [int(n) for n in space.nvec.ravel()]
        parts = [nn.functional.one_hot(column, size) for column, size in zip(numbers.T, sizes, strict=True)]
        return torch.cat(parts, 1).to(_default())
    vectors: Tensor = observations.reshape(len(observations), -1)
    return vectors if vectors.is_floating_point() else vectors.to(_default())


def _default() -> torch.dtype:
    return torch.get_default_dtype()


def mlp(
    inputs: int, outputs: int, *, width: int = 64, layers: int = 2, activation: type[nn.Module] = nn.Tanh, gain: float
) -> nn.Sequential:
    """Fully connected, weights orthogonal: times the square root of 2 inside, times ``gain`` in the last layer.

    Schulman et al. 2017's code, and detail 2 of Huang et al. 2022; biases begin at 0.
    """
    sizes = [inputs, *[width] * layers]
    hidden = [
        part
        for size, following in pairwise(sizes)
        for part in (orthogonal(nn.Linear(size, following), math.sqrt(2)), activation())
    ]
    return nn.Sequential(*hidden, orthogonal(nn.Linear(sizes[-1], outputs), gain))


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Module:
    """``layer``, with orthogonal weights of that gain and without a bias at first."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class PictureTrunk(nn.Sequential):
    """The convolutions of Mnih et al. 2015 over stacked frames ``[B, 4, 84, 84]`` of bytes, to ``[B, 512]``."""

    def __init__(self, frames: int = 4, features: int = 512) -> None:
        gain = math.sqrt(2)
        super().__init__(
            orthogonal(nn.Conv2d(frames, 32, 8, stride=4), gain), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2), gain), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1), gain), nn.ReLU(),
            nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, features), gain), nn.ReLU(),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        """Features of ``frames``."""
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        # Channels last is how convolutions are fastest: an update on a CPU takes three quarters of the time. Bytes are
        # laid out so before they are made numbers four times as large.
        frames = frames.contiguous(memory_format=torch.channels_last)
        features: Tensor = super().forward(frames.to(weight.dtype) / 255)
        return features


def actor_critic(
    observation_space: gym.Space[Any],
    distribution: ActionDistribution,
    *,
    width: int = 64,
    shared: bool = False,
    log_std: float = 0.0,
    policy_gain: float = 0.01,
) -> ActorCritic:
    """The usual networks: convolutions for 84x84 frames, two fully connected layers of ``width`` for anything else.

    ``shared`` puts policy and value on one trunk, as frames always have them.
    """
    if observation_space.shape is not None and len(observation_space.shape) == 3:
        if observation_space.shape[1:] != (84, 84):
            raise ConfigError(
                f"observations of shape {observation_space.shape}: the network for pictures takes [frames, 84, 84]; "
                "resize them (gymnasium.wrappers.AtariPreprocessing, FrameStackObservation) or give a policy and value"
            )
        trunk: nn.Module | None = PictureTrunk(observation_space.shape[0])
        inputs, layers = 512, 0
    elif shared:
        inputs = spaces.flatdim(observation_space)
        body = mlp(inputs, width, width=width, layers=1, gain=math.sqrt(2))
        trunk, inputs, layers = nn.Sequential(*_features(observation_space), *body, nn.Tanh()), width, 0
    else:
        trunk, inputs, layers = None, spaces.flatdim(observation_space), 2
    before = [] if trunk is not None else _features(observation_space)
    continuous = isinstance(distribution, Gaussian)
    outputs = distribution.size // 2 if continuous else distribution.size
    head: nn.Module = nn.Sequential(*before, *mlp(inputs, outputs, width=width, layers=layers, gain=policy_gain))
    if continuous:
        head = GaussianPolicy(head, outputs, log_std=log_std)
    value = nn.Sequential(*before, *mlp(inputs, 1, width=width, layers=layers, gain=1.0))
    return ActorCritic(head, value, trunk)


def _features(space: gym.Space[Any]) -> list[nn.Module]:
    return [] if is_real_vector(space) else [Features(space)]


def is_real_vector(space: gym.Space[Any]) -> bool:
    """Whether observations of ``space`` can go into a fully connected layer as they are."""
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
