"""Penalties on weights, and mixed samples, as functions without state.

Label smoothing needs none of its own: ``torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)``
takes class indices and the soft targets of :func:`mixup` and :func:`cutmix` alike.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lightning_custom.errors import ConfigError


def orthogonal_penalty(weight: Tensor) -> Tensor:
    """``||W W^T - I||_F^2``, zero where the rows of ``W`` are orthonormal (or its columns, if there are more rows).

    ``weight`` is ``[O, ...]`` and is read as the matrix ``W [O, I]``. Of the two Gram matrices the smaller is taken:
    it alone can become the identity, and the gradient is the same. Orthogonal regularisation (Brock et al. 2017) in
    the squared form of Brock et al. 2019, eq. 2, and Bansal et al. 2018 (soft orthogonality).
    """
    matrix = _as_matrix(weight)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().sum()


def spectral_penalty(
    weight: Tensor, *, iterations: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The square of the largest singular value of ``weight [O, ...]`` read as a matrix ``[O, I]``.

    Yoshida and Miyato 2017, without the factor lambda/2. Exact by default. With ``iterations`` the singular
    vectors come from as many power iterations, which is cheaper for large weights and never above the exact value:
    the start is drawn from ``generator``, the step's shared one, so that every process and a replayed step get the
    same number. There is no vector kept from step to step, so take about ten.
    """
    matrix = _as_matrix(weight)
    if iterations is None:
        largest: Tensor = torch.linalg.svdvals(matrix)[0]
        return largest.square()
    if iterations < 1:
        raise ConfigError(f"iterations: {iterations}; give at least 1, or None for the exact value")
    if generator is None:
        raise ConfigError("generator: none; power iteration starts at random, give the step's shared generator")
    with torch.no_grad():
        start = torch.randn(matrix.shape[1], dtype=matrix.dtype, generator=generator)
        right = normalize(start.to(matrix.device), dim=0)
        for _ in range(iterations):
            left = normalize(matrix @ right, dim=0)
            right = normalize(matrix.T @ left, dim=0)
    return (left @ matrix @ right).square()


def _as_matrix(weight: Tensor) -> Tensor:
    if weight.dim() < 2:
        raise ConfigError(f"weight: shape {tuple(weight.shape)}; give a matrix or more, and leave biases out")
    return weight.flatten(1)


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, *, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each sample blended with its neighbour, ``share * own + (1 - share) * neighbour``: images and soft targets.

    ``images`` is floating-point ``[B, ...]``; ``labels`` is ``[B]`` of class indices or ``[B, num_classes]`` of
    probabilities; the targets are ``[B, num_classes]``. One ``share`` of Beta(alpha, alpha) is drawn for the batch.
    Zhang et al. 2018.

    Neighbours are samples 2k and 2k + 1, which lie on the same process for every even part of the batch, so that
    the number of processes changes nothing. In a shuffled batch a neighbour is a random partner; ``generator`` is the
    step's shared one. :class:`ConfigError` for an odd number of samples.
    """
    targets = _soft_targets(images, labels, num_classes)
    share = _beta(alpha, generator)
    return _blend(images, share), _blend(targets, share)


def cutmix(
    images: Tensor, labels: Tensor, num_classes: int, *, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image with one rectangle from its neighbour's, and targets weighted by area.

    As :func:`mixup`, for images ``[B, ..., H, W]``: the rectangle is the same for the whole batch, covers
    ``1 - share`` of the image with ``share`` of Beta(alpha, alpha), and is cut at the border, after which the targets
    follow the area that is left. Yun et al. 2019, section 3.1.
    """
    targets = _soft_targets(images, labels, num_classes)
    if images.dim() < 3:
        raise ConfigError(f"images: shape {tuple(images.shape)}; cutmix needs [B, ..., height, width]")
    height, width = images.shape[-2:]
    side = (1 - _beta(alpha, generator)) ** 0.5
    middle_row, middle_column = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    top, bottom = _span(middle_row, side, height)
    left, right = _span(middle_column, side, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = _neighbours(images[..., top:bottom, left:right])
    return mixed, _blend(targets, 1 - (bottom - top) * (right - left) / (height * width))


def _span(middle: float, side: float, size: int) -> tuple[int, int]:
    length, centre = int(side * size), int(middle * size)
    start = centre - length // 2
    return max(start, 0), min(start + length, size)


def _neighbours(batch: Tensor) -> Tensor:
    return torch.stack([batch[1::2], batch[::2]], dim=1).flatten(0, 1)


def _blend(batch: Tensor, share: float) -> Tensor:
    return share * batch + (1 - share) * _neighbours(batch)


def _beta(alpha: float, generator: torch.Generator) -> float:
    if not alpha > 0:
        raise ConfigError(f"alpha: {alpha}; give a number above 0, or leave the mixing out")
    # torch.distributions takes no generator.
    own, other = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return float(own / (own + other))


def _soft_targets(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    if len(images) % 2:
        raise ConfigError(
            f"batch_size: {len(images)} samples on this process; mixing pairs neighbours, give each process an even "
            "number"
        )
    if not images.is_floating_point():
        raise ConfigError(f"images: {images.dtype}; turn them into floating point before mixing")
    if labels.dim() == 1 and labels.is_floating_point():
        raise ConfigError(f"labels: {labels.dtype}; give class indices [B], or [B, {num_classes}] of probabilities")
    if labels.dim() == 1:
        return one_hot(labels.long(), num_classes).to(images.dtype)
    if labels.shape[1:] != (num_classes,):
        raise ConfigError(f"labels: shape {tuple(labels.shape)}; give [B] or [B, {num_classes}]")
    return labels
