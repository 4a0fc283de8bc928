"""Latents to look at a generator with, and files of its samples."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_custom.config import require_at_least
from lightning_custom.errors import ConfigError
from lightning_custom.events import png_bytes
from lightning_custom.output_file import require_ending, write_file
from lightning_custom.pictures import image_grid

FILES = (".png", ".npy", ".npz")
"""What :func:`write_samples` writes, by the ending of the file's name."""


def truncated_latents(
    count: int, size: int, generator: torch.Generator, *, threshold: float = 0.0, psi: float = 1.0
) -> Tensor:
    """Normal latents ``[N, Z]``, nearer to their mean: less variety, and less that the generator has rarely seen.

    ``threshold`` draws every number anew that lies beyond it (Brock et al. 2019, section 3.1; 0: none). ``psi`` then
    multiplies all. In a generator whose first layer is linear in the latent, as the library's are, that moves this
    layer's output towards its mean over latents, class by class and under the weights that are sampled from: the
    truncation of Karras et al. 2019 (StyleGAN, appendix B), with a mean that is known exactly.
    """
    if threshold < 0:
        raise ConfigError(f"threshold: {threshold}; it must be at least 0")
    latents = torch.randn(count, size, generator=generator)
    while threshold and (beyond := latents.abs() > threshold).any():
        latents[beyond] = torch.randn(int(beyond.sum()), generator=generator)
    return latents * psi


def spherical_path(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Latents ``[N, steps, Z]`` from ``first`` to ``last`` ``[N, Z]``, turning at an even pace, ends included.

    Along a line normal latents would pass through lengths that never occur (White 2016); here the length changes
    geometrically from one end's to the other's.

    >>> spherical_path(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 4.0]]), 3)[0, 1].tolist()
    [1.4142135381698608, 1.4142135381698608]
    """
    share = torch.linspace(0, 1, steps, dtype=first.dtype)[None, :, None]
    lengths = [latents.norm(dim=1, keepdim=True)[:, None] for latents in (first, last)]
    start, end = first[:, None] / lengths[0], last[:, None] / lengths[1]
    angle = (start * end).sum(2, keepdim=True).clamp(-1, 1).acos()
    turned = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()
    # Where both ends point the same way there is nothing to turn.
    turned = torch.where(angle.sin() < 1e-6, start, turned)
    path: Tensor = turned * lengths[0] ** (1 - share) * lengths[1] ** share
    return path


def sampler(generator: nn.Module, *, conditional: bool, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """``(latents [N, Z], labels [N]) -> images [N, C, H, W]`` in ``generator``'s own precision, in float32, by 500."""
    dtype = next(generator.parameters()).dtype

    def sample(latents: Tensor, labels: Tensor) -> Tensor:
        inputs = (latents.to(dtype), labels) if conditional else (latents.to(dtype),)
        parts = zip(*(part.to(device).split(500) for part in inputs), strict=True)
        with torch.no_grad():
            return torch.cat([generator(*part).float() for part in parts])

    return sample


def write_samples(path: Path, images: Tensor, labels: Tensor, columns: int) -> None:
    """Write images ``[N, C, H, W]`` in [-1, 1] as a picture of a grid, or as an array.

    ``.png``: rows of ``columns``. ``.npy``: uint8 ``[N, H, W, C]``. ``.npz``: that as ``images``, and ``labels``.
    :class:`ConfigError` for another ending, and where the file cannot be written.
    """
    require_ending(path, FILES)
    unit = (images.detach().cpu() + 1) / 2
    buffer = io.BytesIO()
    if path.suffix == ".png":
        buffer.write(png_bytes(image_grid(unit, columns, scale=max(1, 64 // images.shape[-1]))))
    else:
        pixels = unit.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        if path.suffix == ".npy":
            np.save(buffer, pixels)
        else:
            np.savez_compressed(buffer, images=pixels, labels=labels.cpu().numpy())
    write_file(path, buffer.getvalue())


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """What every recipe's verb ``sample`` is asked."""

    run_dir: str
    """Directory of the run."""
    count: int = 64
    """Number of samples, or of rows."""
    out: str = "grid.png"
    """File to write: a picture of a grid (.png) or an array (.npy, and .npz with labels)."""
    which: Literal["best", "last"] = "best"
    """Checkpoint to take."""
    label: int | None = None
    """Class of all samples; none: a column a class, or of rows a row a class."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        require_at_least(self, {"count": 1})

    def labels(self, num_classes: int) -> tuple[Tensor, int]:
        """Labels ``[count]``, all 0 without classes, and the columns of their grid."""
        if self.label is not None and not 0 <= self.label < num_classes:
            raise ConfigError(f"label: {self.label}; the run has {num_classes} classes, counted from 0")
        if self.label is None and num_classes:
            return torch.arange(self.count) % num_classes, num_classes
        return torch.full((self.count,), self.label or 0), math.isqrt(self.count - 1) + 1


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawConfig):
    """Draw samples from a run's best or last checkpoint."""

    weights: Literal["average", "generator"] = "average"
    """The generator's average, or its last weights."""
    threshold: float = 0.0
    """Numbers of a latent beyond this are drawn again; 0: none."""
    psi: float = 1.0
    """Factor of all latents: below 1 less variety, 0 the mean of each class."""
    interpolate: int = 0
    """Images of each row from one latent to another; 0: no interpolation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"threshold": 0, "psi": 0, "interpolate": 0})

    def inputs(self, latent_size: int, num_classes: int) -> tuple[Tensor, Tensor, int]:
        """Latents ``[N, Z]``, labels ``[N]`` and the columns of their grid, for a generator of these sizes."""
        labels, columns = self.labels(num_classes)
        draw = torch.Generator().manual_seed(self.seed)
        ends = 2 if self.interpolate else 1
        latents = truncated_latents(ends * self.count, latent_size, draw, threshold=self.threshold, psi=self.psi)
        if self.interpolate:
            first, last = latents.chunk(2)
            path = spherical_path(first, last, self.interpolate)
            return path.flatten(0, 1), labels.repeat_interleave(self.interpolate), self.interpolate
        return latents, labels, columns
