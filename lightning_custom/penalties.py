"""What a discriminator minimises beside its loss: a weighted sum of penalties on the samples of a batch."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_custom.adversarial import interpolated, norm_penalty, squared_gradient_norms
from lightning_custom.augmentation import diff_augment
from lightning_custom.distributed import take_share
from lightning_custom.parts import WHOLE, Part


class Verdict(NamedTuple):
    """What a discriminator says of ``[B]`` samples."""

    logits: Tensor
    """``[B]``, high for real."""
    classes: Tensor | None = None
    """``[B, K]`` logits of the class, with an auxiliary classifier."""


Judge = Callable[[Tensor, list[Tensor], torch.Generator, Part], Verdict]
"""``judge(samples, label, draw, part)``, with no label or one, and draws for augmentation."""


class Weights(Protocol):
    """The penalties' weights, as a config has them; 0 leaves one out."""

    @property
    def r1(self) -> float:
        """Of ``|grad D|^2 / 2`` on real samples (Mescheder et al. 2018, eq. 9)."""

    @property
    def r2(self) -> float:
        """Of the same on generated samples (eq. 10)."""

    @property
    def gp(self) -> float:
        """Of ``(|grad D| - 1)^2`` between the two (Gulrajani et al. 2017, eq. 3)."""

    @property
    def dragan(self) -> float:
        """Of the same on real samples with noise (Kodali et al. 2017)."""

    @property
    def dragan_std(self) -> float:
        """That noise's deviation."""

    @property
    def bcr(self) -> float:
        """Of the squared change of logits when a sample is moved (Zhao et al. 2020b)."""

    @property
    def batch_size(self) -> int:
        """Real samples of all processes."""


def needs_input_gradient(weights: Weights) -> bool:
    """Whether :func:`penalties` differentiates the logits that it is given: R1 and R2 together share their pass."""
    return bool(weights.r1 and weights.r2)


def penalties(
    fabric: Fabric,
    weights: Weights,
    judge: Judge,
    samples: Tensor,
    logits: Tensor,
    label: list[Tensor],
    draw: torch.Generator,
    part: Part = WHOLE,
) -> Tensor:
    """The weighted sum of the penalties on ``samples``, real ones before as many generated ones, with their logits.

    Where :func:`needs_input_gradient` says so, ``samples`` required a gradient before ``logits`` were computed. Noise
    is drawn for the global batch from ``draw``, the step's shared generator.
    """

    def norms(around: Tensor) -> Tensor:
        around = around.detach().requires_grad_()
        return squared_gradient_norms(judge(around, label, draw, part).logits, around)

    total, (real, fake) = torch.zeros((), device=samples.device), samples.detach().chunk(2)
    if needs_input_gradient(weights):
        r1, r2 = squared_gradient_norms(logits, samples).chunk(2)
        total = weights.r1 / 2 * r1.mean() + weights.r2 / 2 * r2.mean()
    elif weights.r1 or weights.r2:
        # On half of the samples: a pass of their own costs less than second derivatives of all.
        total = (weights.r1 or weights.r2) / 2 * norms(real if weights.r1 else fake).mean()
    if weights.gp:
        mix = part.of(take_share(torch.rand(weights.batch_size, generator=draw), fabric))
        total = total + weights.gp * norm_penalty(norms(interpolated(real, fake, mix)))
    if weights.dragan:
        noise = part.of(take_share(torch.randn(weights.batch_size, *real.shape[1:], generator=draw), fabric))
        total = total + weights.dragan * norm_penalty(norms(real + weights.dragan_std * noise))
    if weights.bcr:
        moved = diff_augment(fabric, samples.detach(), ("translation",), draw, batches=2, part=part)
        # Twice the mean over both kinds is the sum of the means over each.
        total = total + weights.bcr * 2 * mse_loss(judge(moved, label, draw, part).logits, logits)
    return total
