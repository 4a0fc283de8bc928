"""Random changes to training images, drawn for the global batch, so that the number of processes changes nothing."""

from collections.abc import Collection

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import pad

from lightning_custom.distributed import take_share
from lightning_custom.errors import ConfigError
from lightning_custom.parts import WHOLE, Part

POLICIES = ("color", "translation", "cutout")
"""The parts of :func:`diff_augment`, in the order in which they are done."""


def shift_and_flip(
    fabric: Fabric, images: Tensor, *, shift: int, flip: bool, background: float, generator: torch.Generator
) -> Tensor:
    """This process's images ``[B, C, H, W]``, each moved by up to ``shift`` pixels, half of them mirrored.

    What moves in has the value ``background``; :class:`ConfigError` for integers, which cannot have it. ``generator``
    is the step's shared one; every process holds an equal part of the batch.
    """
    everywhere = (len(images) * fabric.world_size,)
    if shift and not images.is_floating_point():
        raise ConfigError(f"shift: {shift}, but images are {images.dtype}; give floats in [-1, 1], or set shift to 0")
    if shift:
        offsets = torch.randint(0, 2 * shift + 1, (*everywhere, 2), generator=generator)
        down, right = take_share(offsets, fabric).unbind(1)
        images = _moved(images, down, right, (shift, shift), background)
    if flip:
        mirrored = take_share(torch.rand(everywhere, generator=generator) < 0.5, fabric)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()


def diff_augment(
    fabric: Fabric,
    images: Tensor,
    policy: Collection[str],
    generator: torch.Generator,
    *,
    batches: int = 1,
    part: Part = WHOLE,
    strength: float = 1.0,
) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1], each changed by the parts of ``policy``, differentiably.

    DiffAugment (Zhao et al. 2020a, section 3.2 and appendix): a discriminator sees real and generated images only
    like this, and the generator learns through it.

    - ``color``: brightness by up to 0.5 either way, saturation times 0 to 2, contrast times 0.5 to 1.5;
    - ``translation``: by up to an eighth of each side;
    - ``cutout``: a rectangle of half of each side, about any pixel, becomes 0.

    What moves in is 0. ``strength`` multiplies the widths of all these ranges: 0 changes nothing. ``images`` are
    ``batches`` of this process's equal shares of a global batch, one behind the other, or of a ``part`` of each;
    ``generator`` is the step's shared one. :class:`ConfigError` for an unknown policy, or samples that are no images.
    """
    if not policy:
        return images
    if unknown := sorted(set(policy) - set(POLICIES)):
        raise ConfigError(f"augment: {', '.join(unknown)} is unknown; choose among {', '.join(POLICIES)}")
    if images.dim() != 4:
        raise ConfigError(f"augment: samples of shape {tuple(images.shape)} are no images [B, C, H, W]; leave it out")
    draws = Draws(fabric, len(images), generator, batches=batches, part=part)
    if "color" in policy:
        factors = [2 * draws.uniform() - 1 for _ in range(3)]
        images = _recoloured(images, *(strength * factor.to(images.dtype) for factor in factors))
    if "translation" in policy:
        rows, columns = (int(strength * side / 8 + 0.5) for side in images.shape[2:])
        down, right = draws.integers(0, 2 * rows), draws.integers(0, 2 * columns)
        images = _moved(images, down, right, (rows, columns), 0.0)
    if "cutout" in policy:
        sizes = [int(strength * side / 2 + 0.5) for side in images.shape[2:]]
        # An even rectangle has no middle pixel: one place more makes up for it.
        ends = [side - size % 2 for side, size in zip(images.shape[2:], sizes, strict=True)]
        down, right = (draws.integers(0, end) for end in ends)
        inside_rows = _within(down - sizes[0] // 2, sizes[0], images.shape[2])
        inside_columns = _within(right - sizes[1] // 2, sizes[1], images.shape[3])
        images = images.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :]).unsqueeze(1), 0.0)
    return images.contiguous()


class Draws:
    """Numbers ``[B]`` for samples, drawn for all of the global batch, then cut by process and by part.

    ``size`` is that of what this process has: ``batches`` batches, one behind the other, of the same part.
    """

    def __init__(
        self, fabric: Fabric, size: int, generator: torch.Generator, *, batches: int = 1, part: Part = WHOLE
    ) -> None:
        self._fabric, self._generator, self._part = fabric, generator, part
        self._everywhere = (size // batches * part.count * fabric.world_size, batches)

    def _own(self, numbers: Tensor) -> Tensor:
        return self._part.of(take_share(numbers, self._fabric)).transpose(0, 1).flatten()

    def uniform(self) -> Tensor:
        """In [0, 1)."""
        return self._own(torch.rand(self._everywhere, generator=self._generator))

    def normal(self) -> Tensor:
        """Of mean 0 and deviation 1."""
        return self._own(torch.randn(self._everywhere, generator=self._generator))

    def integers(self, low: int, high: int) -> Tensor:
        """From ``low`` to ``high``, both included."""
        return self._own(torch.randint(low, high + 1, self._everywhere, generator=self._generator))


def _moved(images: Tensor, down: Tensor, right: Tensor, most: tuple[int, int], background: float) -> Tensor:
    """Each image cut at ``(down, right)`` out of itself with a margin of ``most`` rows and columns around it."""
    count, _, height, width = images.shape
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    padded = pad(images, (most[1], most[1], most[0], most[0]), value=background)
    each = torch.arange(count, device=images.device)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _recoloured(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Images with a number ``[B]`` in [-1, 1] each for brightness, saturation (no more of it: -1) and contrast."""
    brightness, saturation, contrast = (each.view(-1, 1, 1, 1) for each in (brightness, saturation, contrast))
    images = images + brightness / 2
    images = images + saturation * (images - images.mean(1, keepdim=True))
    return images + contrast / 2 * (images - images.mean((1, 2, 3), keepdim=True))


def _within(first: Tensor, size: int, side: int) -> Tensor:
    """Which of ``side`` places lie in the ``size`` from ``first`` ``[B]`` on, as ``[B, side]``."""
    places = torch.arange(side, device=first.device) - first[:, None]
    return (places >= 0) & (places < size)
