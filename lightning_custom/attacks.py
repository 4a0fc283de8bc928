"""Perturbations of inputs that a classifier gets wrong: balls, projected gradient ascent, random search.

Everything is for one batch ``[B, ...]`` whose samples do not see each other: where the model is such too, cutting the
batch changes no sample's result. Inputs lie in a box, [0, 1] unless said otherwise; a model that wants them normalised
does it itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Norm = Literal["linf", "l2"]

Classify = Callable[[Tensor], Tensor]
"""``inputs [B, ...] -> logits [B, K]``."""


@dataclass(frozen=True)
class Ball:
    """What an attacker may do: move an input by at most ``eps`` in ``norm``, within the box [``low``, ``high``]."""

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0

    def project(self, inputs: Tensor, points: Tensor) -> Tensor:
        """``points`` moved into the ball around ``inputs``, then into the box, up to the rounding of one addition.

        For L-inf this is the nearest point of both. For L2 it is in both, as the box holds ``inputs`` and so only
        shortens what is cut, but there may be a nearer one.
        """
        offset = points - inputs
        if self.norm == "linf":
            offset = offset.clamp(-self.eps, self.eps)
        else:
            offset = offset * (self.eps / _norms(offset).clamp_min(1e-12)).clamp_max(1.0)
        return (inputs + offset).clamp_(self.low, self.high)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of norm 1 in which each sample's loss rises fastest; zero where its gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def start(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniformly random offsets in the ball, ``shape`` being ``[B, ...]``, on the CPU."""
        if self.norm == "linf":
            return (2 * torch.rand(shape, generator=generator) - 1) * self.eps
        direction = torch.randn(shape, generator=generator)
        radius = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=generator)
        return direction / _norms(direction) * radius.pow_(1 / math.prod(shape[1:])) * self.eps


def _norms(tensor: Tensor) -> Tensor:
    """Each sample's Euclidean norm, ``[B, 1, ...]``."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)
    return norms


def pgd(
    losses: Callable[[Tensor], Tensor],
    inputs: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on ``losses(points [B, ...]) -> [B]`` from ``inputs + start``.

    Madry et al. 2018, section 2.1.
    ``step_size`` is in the units of ``ball.eps``. One step of it from ``start`` none is FGSM (Goodfellow et al. 2015);
    from a random start and with 1.25 eps that of Wong et al. 2020. Only the inputs are differentiated.
    """
    points = inputs if start is None else ball.project(inputs, inputs + start)
    for _ in range(steps):
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            # The sum, not the mean: a sample's gradient then depends on no other, nor on the size of the batch.
            (gradient,) = torch.autograd.grad(losses(points).sum(), points)
        points = ball.project(inputs, points.detach() + step_size * ball.steepest(gradient))
    return points.detach()


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the best wrong class leads, ``[B]``; above 0 where the prediction is wrong."""
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    return logits.masked_fill(is_label, -torch.inf).amax(1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def pgd_with_restarts(
    classify: Classify,
    inputs: Tensor,
    labels: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
) -> Tensor:
    """The first point that is misclassified, of the input itself and the ends of PGD from ``restarts`` random starts.

    Where none is, the last end. A sample that is fooled is left out of the restarts that follow. Each restart has one
    random start that all samples share, so that what a sample gets depends on neither its batch nor its process.
    """
    worst = inputs.clone()
    left = margins(classify(inputs), labels).le(0).nonzero().squeeze(1)
    for _ in range(restarts):
        if len(left) == 0:
            break
        start = ball.start((1, *inputs.shape[1:]), generator).to(inputs)
        targets = labels[left]

        def losses(points: Tensor, targets: Tensor = targets) -> Tensor:
            return cross_entropy(classify(points), targets, reduction="none")

        found = pgd(losses, inputs[left], ball, steps=steps, step_size=step_size, start=start)
        worst[left] = found
        left = left[margins(classify(found), targets).le(0)]
    return worst


@torch.no_grad()
def square_search(
    classify: Classify,
    inputs: Tensor,
    labels: Tensor,
    ball: Ball,
    *,
    queries: int,
    generator: torch.Generator,
    share: float = 0.3,
) -> Tensor:
    """The points of the largest margin that a random search finds for images ``[B, C, H, W]``, without any gradient.

    After Andriushchenko et al. 2020, algorithm 1: each query writes a square of one random sign a channel into the
    perturbation, and a sample keeps it where its margin rises. The square's area falls from ``share`` of the image. A
    model that is only hard to differentiate is not safe from it. All samples share the squares, as starts are shared in
    :func:`pgd_with_restarts`; for L2 the square is added at half the radius and the whole projected.
    """
    channels, height, width = inputs.shape[1:]
    stripes = torch.randint(2, (1, channels, 1, width), generator=generator).to(inputs) * 2 - 1
    scale = ball.eps if ball.norm == "linf" else ball.eps / math.sqrt(channels * height * width)
    points = ball.project(inputs, inputs + scale * stripes)
    best = margins(classify(points), labels)
    for query in range(queries):
        side = max(1, round(math.sqrt(share * _remaining(query / queries) * height * width)))
        side = min(side, height, width)
        top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in (height, width))
        signs = torch.randint(2, (channels, 1, 1), generator=generator).to(inputs) * 2 - 1
        window = (..., slice(top, top + side), slice(left, left + side))
        tried = points.clone()
        if ball.norm == "linf":
            tried[window] = inputs[window] + ball.eps * signs
        else:
            tried[window] += ball.eps / (2 * side * math.sqrt(channels)) * signs
        tried = ball.project(inputs, tried)
        found = margins(classify(tried), labels)
        better = found > best
        best = torch.where(better, found, best)
        points = torch.where(better.view(-1, 1, 1, 1), tried, points)
    return points


def _remaining(progress: float) -> float:
    """The share of its first area that a square still has, after the paper's schedule of halvings."""
    return 0.5 ** sum(progress > bound for bound in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
