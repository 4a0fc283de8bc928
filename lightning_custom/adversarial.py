"""Losses and penalties between a generator and a discriminator.

Logits are ``[B]`` or ``[B, ...]``: high means real. Every loss is a mean over its batch, so that the mean over equal
parts of a batch, each on a process of its own, is the loss of the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus
from torch.nn.utils import parametrizations

from lightning_custom.distributed import global_mean
from lightning_custom.errors import ConfigError
from lightning_custom.precision import unwrap


class AdversarialLoss(NamedTuple):
    """What the discriminator and the generator each minimise, given ``(real_logits, fake_logits)``."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]
    generator_sees_real: bool = False
    """Whether the generator's loss needs ``real_logits``; where not, they may be None."""
    is_decided_at_zero: bool = False
    """Whether a logit above zero says real; where not, only differences or other values of logits mean something."""


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


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
    discriminator=_logistic,
    generator=lambda real, fake: softplus(-fake).mean(),
    is_decided_at_zero=True,
)
"""Non-saturating logistic loss (Goodfellow et al. 2014, section 3)."""

saturating = AdversarialLoss(
    discriminator=_logistic, generator=lambda real, fake: -softplus(fake).mean(), is_decided_at_zero=True
)
"""The minimax game itself (Goodfellow et al. 2014, eq. 1).

The generator's gradient vanishes where the discriminator is sure of itself: it is here to compare with.
"""

hinge = AdversarialLoss(
    discriminator=lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean(),
    generator=lambda real, fake: -fake.mean(),
    is_decided_at_zero=True,
)
"""Hinge loss (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

least_squares = AdversarialLoss(
    discriminator=lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,
    generator=lambda real, fake: (fake - 1).square().mean() / 2,
)
"""Least squares towards 1 for real and 0 for generated samples (LSGAN, Mao et al. 2017, eq. 9)."""

wasserstein = AdversarialLoss(
    discriminator=lambda real, fake: fake.mean() - real.mean(), generator=lambda real, fake: -fake.mean()
)
"""Differences of mean logits (Arjovsky et al. 2017, eq. 2), for use with :func:`norm_penalty`."""


def _against_the_average(above: Tensor | None, below: Tensor | None) -> Tensor:
    assert above is not None
    assert below is not None
    return softplus(global_mean(below) - above).mean() + softplus(below - global_mean(above)).mean()


relativistic_average = AdversarialLoss(
    discriminator=_against_the_average,
    generator=lambda real, fake: _against_the_average(fake, real),
    generator_sees_real=True,
)
"""Each logit against the mean of the other kind (RaSGAN, Jolicoeur-Martineau 2018, algorithm 2).

The means are those of the global batch. A constant added to all logits has no gradient, as for :data:`relativistic`.
"""

_SCALE = 2.0**10
"""Lifts the gradients of 16-mixed out of float16's underflow; a power of two changes no bit elsewhere."""

LOSSES = {
    "r3": relativistic,
    "nonsaturating": nonsaturating,
    "hinge": hinge,
    "saturating": saturating,
    "lsgan": least_squares,
    "wasserstein": wasserstein,
    "relativistic-average": relativistic_average,
}
"""The losses by the names that a config uses."""


def squared_gradient_norms(logits: Tensor, samples: Tensor) -> Tensor:
    """``[B]`` squared norms of each logit's gradient with respect to its sample, differentiable again.

    With real samples their mean is R1, with generated ones R2 (Mescheder et al. 2018, eq. 9 and 10), each without
    the factor gamma/2. One call on both at once costs one gradient instead of two. ``samples`` is ``[B, ...]`` and
    must require a gradient before the forward pass.
    """
    (gradient,) = torch.autograd.grad(logits, samples, torch.full_like(logits, _SCALE), create_graph=True)
    return gradient.square().flatten(1).sum(1) / _SCALE**2


def norm_penalty(squared_norms: Tensor, target: float = 1.0) -> Tensor:
    """The mean of ``(norm - target)^2``, given the ``[B]`` results of :func:`squared_gradient_norms`.

    On :func:`interpolated` samples the penalty of WGAN-GP (Gulrajani et al. 2017, eq. 3), on real samples with noise
    that of DRAGAN (Kodali et al. 2017), each without its weight.
    """
    # The root of 0 has no finite derivative.
    return ((squared_norms + 1e-12).sqrt() - target).square().mean()


def interpolated(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """``mix * real + (1 - mix) * fake`` for samples ``[B, ...]`` and one number ``[B]`` a pair; no gradient."""
    mix = mix.view(-1, *(1 for _ in real.shape[1:])).to(real.dtype)
    return torch.lerp(fake.detach(), real.detach(), mix)


def lazy_adam(lr: float, betas: tuple[float, float], every: int) -> tuple[float, tuple[float, float]]:
    """Adam's learning rate and betas where a penalty has an update of its own after every ``every`` others.

    With ``c = every / (every + 1)`` they become ``c lr`` and ``betas ** c``, so that as many steps as before, and the
    same memory, count in updates of the loss. The penalty's weight is multiplied by ``every``. Karras et al. 2020
    (StyleGAN2), appendix B, lazy regularisation. With ``every=1`` the penalty is taken to share the loss's update, and
    nothing changes.

    >>> lazy_adam(1.0, (0.0, 0.25), 1), lazy_adam(2.0, (0.0, 1.0), 3)
    ((1.0, (0.0, 0.25)), (1.5, (0.0, 1.0)))
    """
    if every == 1:
        return lr, betas
    c = every / (every + 1)
    return c * lr, (betas[0] ** c, betas[1] ** c)


def spectrally_normalised(module: nn.Module) -> nn.Module:
    """``module``, whose linear and convolutional weights are from now on divided by their largest singular value.

    Miyato et al. 2018, by torch's parametrization: every forward pass in training mode, with or without a gradient,
    first makes one power iteration, whose vectors are buffers and so in the checkpoint; the passes of penalties, of
    parts of a batch and of the generator's phase count too. It reads the weights alone, so that processes agree.
    Gradients of gradients go through the division. In evaluation mode, as in an average of weights, the vectors stay.
    :class:`ConfigError` for a weight of zeros, which has no direction. Do it before ``fabric.setup``.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            if not layer.weight.any():
                raise ConfigError(f"spectral_norm: {name}.weight is all zeros, which has no norm; leave it out")
            dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            parametrizations.spectral_norm(layer, dim=dim)
    return module


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
