"""Adaptive discriminator augmentation (ADA, Karras et al. 2020a, StyleGAN2-ADA): changes, and how often they are made.

What a discriminator sees is changed with a probability p that follows its overfitting. As in the paper: the changes,
their order, distributions and probabilities (appendix B), and the controller (section 3.1). Not as in the paper:
images are resampled bilinearly, without its low-pass filters, which matter where there are frequencies to fold.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from lightning_custom.augmentation import Draws
from lightning_custom.distributed import sum_over_processes
from lightning_custom.errors import ConfigError
from lightning_custom.parts import WHOLE, Part

CATEGORIES = ("blit", "geometry", "color")
"""The paper's categories, in the order in which they are done; together its "bgc"."""


def adaptive_augment(
    fabric: Fabric,
    images: Tensor,
    categories: Collection[str],
    p: Tensor,
    generator: torch.Generator,
    *,
    batches: int = 1,
    part: Part = WHOLE,
) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1], to each of which each change is made with probability ``p``, differentiably.

    - ``blit``: mirroring, turns by 90 degrees, translation by whole pixels, up to an eighth of each side;
    - ``geometry``: scaling, rotation, scaling of one axis against the other, rotation, translation by fractions;
    - ``color``: brightness, contrast, negative, and of three channels hue and saturation.

    What moves in is mirrored. An image to which nothing happens keeps its bits. ``p`` is a scalar on the device, which
    is never waited for. ``images`` are ``batches`` of this process's part of a global batch, one behind the other;
    ``generator`` is the step's shared one. :class:`ConfigError` for an unknown category or samples that are not images
    of one or three channels.
    """
    if not categories:
        return images
    if unknown := sorted(set(categories) - set(CATEGORIES)):
        raise ConfigError(f"ada: {', '.join(unknown)} is unknown; choose among {', '.join(CATEGORIES)}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ConfigError(
            f"ada: samples of shape {tuple(images.shape)} are no images [B, C, H, W] of 1 or 3 channels; leave it out"
        )
    changes = _Changes(Draws(fabric, len(images), generator, batches=batches, part=part), p, images)
    if "blit" in categories or "geometry" in categories:
        placement = torch.eye(3, dtype=images.dtype, device=images.device).expand(len(images), 3, 3)
        if "blit" in categories:
            placement = changes.blit(placement)
        if "geometry" in categories:
            placement = changes.geometry(placement)
        images = resampled(images, placement)
    return _recoloured(images, changes.color()) if "color" in categories else images


class _Changes:
    """The changes of a batch as matrices ``[B, 3, 3]`` of places (output to input) and ``[B, 4, 4]`` of colours."""

    def __init__(self, draws: Draws, p: Tensor, images: Tensor) -> None:
        self._draws, self._p, self._like = draws, p, images
        self._channels, self._height, self._width = images.shape[1:]

    def _happens(self, value: Tensor, neutral: float = 0.0, p: Tensor | None = None) -> Tensor:
        happens = self._draws.uniform() < (self._p if p is None else p)
        return torch.where(happens, value, neutral)

    # Functions of these are computed in the images' precision: their last bit depends on how many there are.
    def _uniform(self) -> Tensor:
        return (2 * self._draws.uniform() - 1).to(self._like)

    def _normal(self) -> Tensor:
        return self._draws.normal().to(self._like)

    def _integer(self, below: int) -> Tensor:
        return self._draws.integers(0, below - 1).to(self._like)

    def blit(self, placement: Tensor) -> Tensor:
        mirrored = self._happens(self._integer(2))
        placement = placement @ _matrix([[1 - 2 * mirrored, 0, 0], [0, 1, 0], [0, 0, 1]])
        turns = self._happens(self._integer(4)).long()
        # Exact, where a cosine of half a turn would not be.
        cos, sin = (turns.new_tensor(values).to(self._like)[turns] for values in ([1, 0, -1, 0], [0, 1, 0, -1]))
        placement = placement @ _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        right, down = (self._uniform() * side / 8 for side in (self._width, self._height))
        moves = self._draws.uniform() < self._p
        right, down = (torch.where(moves, by.round(), 0.0) for by in (right, down))
        return placement @ _matrix([[1, 0, right], [0, 1, down], [0, 0, 1]])

    def geometry(self, placement: Tensor) -> Tensor:
        size = self._happens(torch.exp2(0.2 * self._normal()), 1.0)
        placement = placement @ _matrix([[1 / size, 0, 0], [0, 1 / size, 0], [0, 0, 1]])
        # Two rotations, of which one happens with probability p.
        p_rotation = 1 - (1 - self._p).clamp_min(0).sqrt()
        placement = placement @ self._rotation(p_rotation)
        stretch = self._happens(torch.exp2(0.2 * self._normal()), 1.0)
        placement = placement @ _matrix([[1 / stretch, 0, 0], [0, stretch, 0], [0, 0, 1]])
        placement = placement @ self._rotation(p_rotation)
        right, down = (self._normal() * side / 8 for side in (self._width, self._height))
        moves = self._draws.uniform() < self._p
        right, down = (torch.where(moves, by, 0.0) for by in (right, down))
        return placement @ _matrix([[1, 0, right], [0, 1, down], [0, 0, 1]])

    def _rotation(self, p: Tensor) -> Tensor:
        angle = self._happens(math.pi * self._uniform(), p=p)
        cos, sin = angle.cos(), angle.sin()
        return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def color(self) -> Tensor:
        """Matrices on (red, green, blue, 1); of one channel the mean of the rows serves."""
        whole = torch.eye(4, dtype=self._like.dtype, device=self._like.device)
        grey = torch.zeros_like(whole)
        grey[:3, :3] = 1 / 3  # projects on the grey axis
        add = self._happens(0.2 * self._normal())
        color = _matrix([[1, 0, 0, add], [0, 1, 0, add], [0, 0, 1, add], [0, 0, 0, 1]])
        times = self._happens(torch.exp2(0.5 * self._normal()), 1.0)
        color = _matrix([[times, 0, 0, 0], [0, times, 0, 0], [0, 0, times, 0], [0, 0, 0, 1]]) @ color
        negative = self._happens(self._integer(2))
        color = (whole - 2 * grey * negative[:, None, None]) @ color
        if self._channels == 1:
            return color
        angle = self._happens(math.pi * self._uniform())
        color = _hue(angle) @ color
        saturation = self._happens(torch.exp2(self._normal()), 1.0)
        return (grey + (whole - grey) * saturation[:, None, None]) @ color


def _hue(angle: Tensor) -> Tensor:
    """Rotation about the grey axis (Rodrigues' formula)."""
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    same, next_, before = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    rows: list[list[Any]] = [[same, next_, before, 0], [before, same, next_, 0], [next_, before, same, 0], [0, 0, 0, 1]]
    return _matrix(rows)


def _matrix(rows: list[list[Any]]) -> Tensor:
    """Matrices ``[B, N, N]`` out of numbers and vectors ``[B]``."""
    (like, *_) = (entry for row in rows for entry in row if isinstance(entry, Tensor))
    entries = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for row in rows for entry in row]
    return torch.stack(entries, dim=1).view(-1, len(rows), len(rows))


def _recoloured(images: Tensor, color: Tensor) -> Tensor:
    if images.shape[1] == 1:
        row = color[:, :3].mean(1)
        return images * row[:, :3].sum(1).view(-1, 1, 1, 1) + row[:, 3].view(-1, 1, 1, 1)
    return torch.einsum("bij,bjhw->bihw", color[:, :3, :3], images) + color[:, :3, 3, None, None]


def resampled(images: Tensor, placement: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` read bilinearly at the places that ``placement`` ``[B, 3, 3]`` gives each pixel.

    Places are in pixels about the middle of the image, (right, down, 1); beyond its border it is mirrored.
    Differentiable any number of times with respect to the images, in which it is linear; torch's own ``grid_sample``
    is once, which R1 and its like cannot use.
    """
    height, width = images.shape[2:]
    half = torch.tensor([width / 2, height / 2, 1], dtype=images.dtype, device=images.device)
    theta = (placement * half / half[:, None])[:, :2]
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    result: Tensor = _Resampled.apply(images, grid)
    untouched = (placement == torch.eye(3, dtype=images.dtype, device=images.device)).all(2).all(1)
    return torch.where(untouched[:, None, None, None], images, result)


class _Resampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Transposed.apply(gradient, grid, ctx.shape), None


class _Transposed(torch.autograd.Function):
    """The transposed linear map of :class:`_Resampled`, whose derivative is that again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        like = gradient.new_empty(shape)
        # Bilinear, mirrored at the border, a gradient by the images alone.
        result, _ = torch.ops.aten.grid_sampler_2d_backward(gradient, like, grid, 0, 2, False, [True, False])
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Resampled.apply(gradient, grid), None, None


class AdaptiveProbability:
    """The probability p of :func:`adaptive_augment`, steered by how sure the discriminator is of real samples.

    After every ``every`` updates p goes up by their real samples over ``images`` where ``r_t``, the mean of
    ``sign(D(real))`` over them and over processes, is above ``target``, and down where below; it stays in [0, 1].
    Karras et al. 2020a, section 3.1 and eq. 1: a target of 0.6, 4 updates, 500,000 images from 0 to 1. With
    ``images=0`` p stays at ``start``. Nothing waits for the device.

        ada.observe(real_logits)         # as often as there are any
        ada.adjust_()                    # once an update, on all processes
    """

    def __init__(
        self, fabric: Fabric, *, start: float = 0.0, target: float = 0.6, every: int = 4, images: float = 500_000
    ) -> None:
        self._fabric, self._target, self._every, self._images = fabric, target, every, images
        self.p = torch.tensor(start, device=fabric.device)
        """The probability, a scalar on the device."""
        self.r = torch.zeros((), device=fabric.device)
        """``r_t`` as it was at the last adjustment."""
        self._local = torch.zeros(2, device=fabric.device)  # sum of signs and their number since the last update
        self._open = torch.zeros(2, device=fabric.device)  # the same over processes and since the last adjustment
        self._updates = 0

    @torch.no_grad()
    def observe(self, real_logits: Tensor) -> None:
        """Count the signs of some of an update's logits of real samples."""
        if self._images == 0:
            return
        self._local[0] += real_logits.sign().sum()
        self._local[1] += real_logits.numel()

    @torch.no_grad()
    def adjust_(self) -> None:
        """End an update; change p where it is time."""
        if self._images == 0:
            return
        # Every update, though every fourth would do: a checkpoint between has the sums of all processes.
        self._open += sum_over_processes(self._fabric, self._local)
        self._local.zero_()
        self._updates += 1
        if self._updates % self._every == 0:
            self.r = self._open[0] / self._open[1]
            self.p = (self.p + (self.r - self._target).sign() * self._open[1] / self._images).clamp(0, 1)
            self._open.zero_()

    def state_dict(self) -> dict[str, Any]:
        """p, and what has been counted towards its next change."""
        return {"p": self.p, "r": self.r, "open": self._open, "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over p and the counts."""
        self.p.copy_(state_dict["p"])
        self.r.copy_(state_dict["r"])
        self._open.copy_(state_dict["open"])
        self._updates = state_dict["updates"]
