"""Networks that say what actions are worth. Shapes: B samples, A actions to choose from, D numbers an action."""

from itertools import pairwise
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lightning_custom.policies import Features, PictureTrunk, is_real_vector


class DuelingHead(nn.Module):
    """Values of actions as the value of the state plus advantages less their mean (Wang et al. 2016, eq. 9)."""

    def __init__(self, value: nn.Module, advantages: nn.Module) -> None:
        super().__init__()
        self.value, self.advantages = value, advantages

    def forward(self, features: Tensor) -> Tensor:
        """``[B, A]``."""
        advantages: Tensor = self.advantages(features)
        values: Tensor = self.value(features) + advantages - advantages.mean(1, keepdim=True)
        return values


def q_network(space: gym.Space[Any], num_actions: int, *, width: int = 256, dueling: bool = False) -> nn.Module:
    """Observations of ``space`` to a value for each action ``[B, A]``; two hidden layers of ``width``.

    84x84 frames go through the convolutions of Mnih et al. 2015. ``dueling`` parts the last hidden layer in two.
    """
    before, size, layers = _trunk(space)
    if not dueling:
        return nn.Sequential(*before, *_mlp(size, num_actions, width, layers))
    body = _mlp(size, width, width, layers - 1) if layers else []
    size = width if layers else size
    head = DuelingHead(*(nn.Sequential(*_mlp(size, outputs, width, 1)) for outputs in (1, num_actions)))
    return nn.Sequential(*before, *body, *([nn.ReLU()] if body else []), head)


class TwinCritics(nn.Module):
    """Two estimates of what an action in an observation is worth, ``[2, B]`` (Fujimoto et al. 2018)."""

    def __init__(self, space: gym.Space[Any], dimensions: int, *, width: int = 256) -> None:
        super().__init__()
        self.features = Features(space)
        size = self.features.size + dimensions
        self.critics = nn.ModuleList(nn.Sequential(*_mlp(size, 1, width, 2)) for _ in range(2))

    def forward(self, observations: Any, actions: Tensor) -> Tensor:
        """Both estimates for ``actions [B, D]``."""
        inputs = torch.cat([self.features(observations), actions], 1)
        return torch.cat([critic(inputs) for critic in self.critics], 1).T


def squashed_gaussian_policy(space: gym.Space[Any], dimensions: int, *, width: int = 256) -> nn.Module:
    """Observations of ``space`` to means and logarithms of standard deviations ``[B, 2 D]``."""
    before, size, layers = _trunk(space)
    return nn.Sequential(*before, *_mlp(size, 2 * dimensions, width, layers))


def _trunk(space: gym.Space[Any]) -> tuple[list[nn.Module], int, int]:
    """What comes before the fully connected layers, the numbers it gives, and how many hidden layers follow."""
    if isinstance(space, spaces.Box) and space.shape[1:] == (84, 84):
        return [PictureTrunk(space.shape[0])], 512, 0
    features = Features(space)
    return [] if is_real_vector(space) else [features], features.size, 2


def _mlp(inputs: int, outputs: int, width: int, layers: int) -> list[nn.Module]:
    # Torch's own initial weights, as in the peers whose settings the presets have.
    sizes = [inputs, *[width] * layers]
    hidden = [part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), nn.ReLU())]
    return [*hidden, nn.Linear(sizes[-1], outputs)]
