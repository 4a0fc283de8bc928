"""Losses and penalties between a generator and a discriminator.

Logits are ``[B]`` or ``[B, ...]``: high means real. Every loss is a mean over its batch, so that the mean over equal
parts of a batch is the loss of the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from lightning_custom.precision import unwrap


class AdversarialLoss(NamedTuple):
    """What the discriminator and the generator each minimise, given ``(real_logits, fake_logits)``."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]
    generator_sees_real: bool = False
    """Whether the generator's loss needs ``real_logits``; where not, they may be None."""


def _paired(real_logits: Tensor | None, fake_logits: Tensor) -> Tensor:
    assert real_logits is not None
    return softplus(real_logits - fake_logits).mean()


relativistic = AdversarialLoss(
    discriminator=lambda real, fake: softplus(fake - real).mean(), generator=_paired, generator_sees_real=True
)
"""Relativistic pairing (Jolicoeur-Martineau 2018; R3GAN, Huang et al. 2024, eq. 2): each real against one fake.

It sees only differences of logits, so a constant added to all has no gradient: leave the discriminator's last bias
out, or Adam amplifies the rounding of that zero.
"""

nonsaturating = AdversarialLoss(
    discriminator=lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
    generator=lambda real, fake: softplus(-fake).mean(),
)
"""Non-saturating logistic loss (Goodfellow et al. 2014, section 3)."""

hinge = AdversarialLoss(
    discriminator=lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean(),
    generator=lambda real, fake: -fake.mean(),
)
"""Hinge loss (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

_SCALE = 2.0**10
"""Lifts the gradients of 16-mixed out of float16's underflow; a power of two changes no bit elsewhere."""

LOSSES = {"r3": relativistic, "nonsaturating": nonsaturating, "hinge": hinge}
"""The losses by the names that a config uses."""


def squared_gradient_norms(logits: Tensor, samples: Tensor) -> Tensor:
    """``[B]`` squared norms of each logit's gradient with respect to its sample, differentiable again.

    With real samples their mean is R1, with generated ones R2 (Mescheder et al. 2018, eq. 9 and 10), each without
    the factor gamma/2. One call on both at once costs one gradient instead of two. ``samples`` is ``[B, ...]`` and
    must require a gradient before the forward pass.
    """
    (gradient,) = torch.autograd.grad(logits, samples, torch.full_like(logits, _SCALE), create_graph=True)
    return gradient.square().flatten(1).sum(1) / _SCALE**2


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of ``module`` gets a gradient, which saves computing one that nobody uses."""
    parameters = [parameter for parameter in unwrap(module).parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
