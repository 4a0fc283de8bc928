"""Networks that denoise: noisy samples, times, and optional labels and estimates to predictions of the same shape."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_custom.errors import ConfigError

_FREQUENCIES = 16


class Conditions(nn.Module):
    """Times ``[B]`` in [0, 1] and labels ``[B]`` to features ``[B, width]``; label ``num_classes`` is none."""

    frequencies: Tensor

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.logspace(-1, 6, _FREQUENCIES, base=2), persistent=False)
        self.times = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None

    def forward(self, times: Tensor, labels: Tensor | None) -> Tensor:
        """Features that the blocks of a network are scaled and shifted by."""
        angles = times[:, None] * self.frequencies
        features = self.times(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.labels is not None and labels is not None:
            features = features + self.labels(labels)
        return silu(features)


class MLPDenoiser(nn.Module):
    """Fully connected residual blocks, for samples ``[B, ...]`` of any shape with few numbers."""

    def __init__(
        self, num_classes: int, shape: tuple[int, ...], width: int = 256, depth: int = 3, *, self_conditioning: bool
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.conditions = Conditions(num_classes, width)
        self.first = nn.Linear(size * (2 if self_conditioning else 1), width)
        self.blocks = nn.ModuleList(_LinearBlock(width) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), zeroed(nn.Linear(width, size)), nn.Unflatten(1, shape))

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor | None, estimates: Tensor | None) -> Tensor:
        """Predictions of the shape of ``noisy``."""
        conditions = self.conditions(times, labels)
        features = self.first(with_estimates(noisy, estimates).flatten(1))
        for block in self.blocks:
            features = block(features, conditions)
        return self.last(features)  # type: ignore[no-any-return]


class UNetDenoiser(nn.Module):
    """Convolutions at two sizes with a shortcut, and attention at the smaller size: images ``[B, C, S, S]``.

    Works on patches of ``patch`` by ``patch`` pixels as if they were pixels of more channels (Hoogeboom et al. 2023,
    section 3.3), at a fraction of the cost. S is a multiple of twice the patch. Group normalisation looks at one sample
    only.
    """

    def __init__(
        self, num_classes: int, shape: tuple[int, int, int], width: int = 32, patch: int = 1, *, self_conditioning: bool
    ) -> None:
        super().__init__()
        channels, height, side = shape
        if height != side or side % (2 * patch):
            raise ConfigError(
                f"patch: {patch}, but images of {height}x{side} need a square side that is a multiple of "
                f"{2 * patch}; set another patch or image_size"
            )
        pixels, conditions = channels * patch**2, 4 * width
        self.conditions = Conditions(num_classes, conditions)
        self.first = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(pixels * (2 if self_conditioning else 1), width, 3, padding=1)
        )
        self.fine = _ConvBlock(width, width, conditions)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([_ConvBlock(2 * width, 2 * width, conditions) for _ in range(2)])
        self.attention = _Attention(2 * width)
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.joined = _ConvBlock(2 * width, width, conditions)
        self.last = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), zeroed(nn.Conv2d(width, pixels, 3, padding=1)), nn.PixelShuffle(patch)
        )

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor | None, estimates: Tensor | None) -> Tensor:
        """Predictions of the shape of ``noisy``."""
        conditions = self.conditions(times, labels)
        fine = self.fine(self.first(with_estimates(noisy, estimates)), conditions)
        before, after = self.coarse
        coarse = after(self.attention(before(self.down(fine), conditions)), conditions)
        return self.last(self.joined(torch.cat([fine, self.up(coarse)], dim=1), conditions))  # type: ignore[no-any-return]


class _ConvBlock(nn.Module):
    def __init__(self, before: int, after: int, conditions: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.modulation = zeroed(nn.Linear(conditions, 2 * after))
        self.norm = nn.GroupNorm(8, after, affine=False)
        self.leave = nn.Sequential(nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = self.modulation(conditions)[:, :, None, None].chunk(2, dim=1)
        changed = self.norm(self.enter(features)) * (1 + scale) + shift
        return self.shortcut(features) + self.leave(changed)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Every place looks at every other, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.enter = nn.Conv2d(width, 3 * width, 1)
        self.leave = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = self.enter(self.norm(features)).flatten(2).chunk(3, dim=1)
        looks = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(query.shape[1]), dim=2)
        return features + self.leave((value @ looks.transpose(1, 2)).view_as(features))  # type: ignore[no-any-return]


class _LinearBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = self.modulation(conditions).chunk(2, dim=1)
        return features + self.layers(self.norm(features) * (1 + scale) + shift)  # type: ignore[no-any-return]


def with_estimates(noisy: Tensor, estimates: Tensor | None) -> Tensor:
    """``[B, C, ...]`` with the estimates of the clean samples behind it: ``[B, 2 C, ...]``."""
    return noisy if estimates is None else torch.cat([noisy, estimates], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with all parameters 0, so that what it is added to begins as it is."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
