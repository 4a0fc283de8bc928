"""What may happen to gradients between the backward pass and the optimizer's step, and to weights after it.

Everything works in place on ``parameter.grad``, leaves absent gradients absent, and never waits for the device. On
several processes the gradients must be the averaged ones, so these lines come after ``mean_gradients_``:

    fabric.backward(loss)
    mean_gradients_(fabric, model)
    grad_norm = clip_norm_(model.parameters(), 1.0)
    optimizer.step()

Parameters are whole on every process: for a sharded model (fsdp) use ``fabric.clip_gradients``. In ``16-mixed`` the
gradients carry the loss scale: call :func:`unscale_` before clipping or noise.

Accumulation has no function, for it is a loop over parts of the batch, whose losses are means over their part:

    for part in parts:
        fabric.backward(loss(model(part)) / len(parts))
    mean_gradients_(fabric, model)                     # once, after the last part
    optimizer.step()
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_custom.errors import ConfigError
from lightning_custom.precision import unwrap
from lightning_custom.sharded import local_part, whole
from lightning_custom.state import unwrap_optimizer


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def unscale_(fabric: Fabric, optimizer: Optimizer) -> None:
    """Divide the optimizer's gradients by the loss scale of ``16-mixed``, once a step; nothing in other precisions.

    The optimizer's step knows of it, and is still left out where a gradient is not finite. Fabric's own way refuses
    fused optimizers, which torch's scaler does not.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None:
        scaler.unscale_(unwrap_optimizer(optimizer))


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, in float32 or wider; 0 without any."""
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros(())
    # bfloat16 keeps three digits of a norm, and a square overflows float16 at 256.
    dtype = reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    norms = torch._foreach_norm(gradients, 2, dtype=dtype)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down so that their norm together is at most ``max_norm``; returns the norm before.

    The scalar stays on the device: log it without waiting. A non-finite norm is not looked at and makes every
    gradient non-finite. Pascanu et al. 2013, algorithm 1; torch's ``clip_grad_norm_``, in float32 where the gradients
    are in half precision.
    """
    _positive("max_norm", max_norm)
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    gradients = _gradients(parameters)
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def clip_value_(parameters: Iterable[nn.Parameter], max_value: float) -> None:
    """Cut every entry of every gradient to [-max_value, max_value]."""
    _positive("max_value", max_value)
    gradients = _gradients(parameters)
    if gradients:
        torch._foreach_clamp_min_(gradients, -max_value)
        torch._foreach_clamp_max_(gradients, max_value)


@torch.no_grad()
def add_noise_(parameters: Iterable[nn.Parameter], std: float, generator: torch.Generator) -> None:
    """Add normal noise of standard deviation ``std`` to every gradient (Neelakantan et al. 2015).

    ``generator`` is the step's shared one, on the CPU, so that every process and every kind of device adds the same
    noise. It costs a transfer of the gradients' size to the device.
    """
    if std < 0:
        raise ConfigError(f"std: {std}; give 0 or more")
    for gradient in _gradients(parameters):
        noise = torch.randn(gradient.shape, dtype=gradient.dtype, generator=generator)
        gradient.add_(noise.to(gradient.device, non_blocking=True), alpha=std)


def annealed_std(step: int, *, eta: float = 0.01, gamma: float = 0.55) -> float:
    """The standard deviation ``sqrt(eta / (1 + step) ** gamma)`` of gradient noise at a step.

    Neelakantan et al. 2015, section 3, who state the variance; their ``eta`` are 0.01, 0.3 and 1.

    >>> annealed_std(0, eta=0.09), round(annealed_std(99, eta=0.09, gamma=1.0), 6)
    (0.3, 0.03)
    """
    return math.sqrt(eta / (1 + step) ** gamma)


@torch.no_grad()
def centralise_(parameters: Iterable[nn.Parameter]) -> None:
    """Take from each gradient its mean over all dimensions but the first: each output's weights then sum to a constant.

    For weights ``[O, ...]`` of linear and convolutional layers; vectors are left alone. Yong et al. 2020, section 3.
    """
    for gradient in _gradients(parameters):
        if gradient.dim() > 1:
            gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))


@contextmanager
def sam_ascent(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Within the block the weights stand ``rho`` up their gradient; afterwards they are, to the bit, what they were.

    The first pass of sharpness-aware minimisation (Foret et al. 2021, eq. 2), for any optimizer:

        optimizer.zero_grad()
        fabric.backward(loss(model(images), labels))
        mean_gradients_(fabric, model)                     # the ascent follows the gradient of the global batch
        with sam_ascent(model.parameters(), rho=0.05):
            optimizer.zero_grad()
            fabric.backward(loss(model(images), labels))   # the gradient up there is the one the optimizer uses
        mean_gradients_(fabric, model)
        optimizer.step()

    Without the first ``mean_gradients_`` each process climbs its own hill (the paper's m-sharpness), and the result
    depends on their number. The direction is the same for gradients that carry a loss scale. Costs a second pass and
    a copy of the weights; running statistics of BatchNorm see both passes.
    """
    _positive("rho", rho)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        raise ConfigError("parameters: none has a gradient; call fabric.backward before sam_ascent")
    weights = [local_part(parameter.detach()) for parameter in parameters]
    with torch.no_grad():
        # Copies, because w + e - e is not w in floating point.
        before = [weight.clone() for weight in weights]
        scale = rho / (whole(gradient_norm(parameters)) + 1e-12)
        gradients = [local_part(gradient) for gradient in _gradients(parameters)]
        torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


class Lookahead:
    """Slow weights that follow a module's own, which any optimizer moves (Zhang et al. 2019, algorithm 1).

        lookahead = Lookahead(model, alpha=0.5)                      # a field of the state
        ...
        optimizer.step()
        state.step += 1
        if due(state.step, config.lookahead_every):                  # the paper's k; 5 and 10 are usual
            lookahead.synchronise_()

    The optimizer's own state is left as it is. Validate right after a synchronisation, or at its weights:
    :attr:`weights`. Make it after ``fabric.setup``.
    """

    def __init__(self, module: nn.Module, *, alpha: float = 0.5) -> None:
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha: {alpha}; give a share above 0 and at most 1")
        self.alpha = alpha
        self._fast: dict[str, Tensor] = dict(unwrap(module).named_parameters())
        self.weights = {name: parameter.detach().clone() for name, parameter in self._fast.items()}
        """The slow weights, by the names of the module's parameters."""

    @torch.no_grad()
    def synchronise_(self) -> None:
        """Move the slow weights by ``alpha`` towards the module's, and the module's onto them."""
        fast, slow = list(self._fast.values()), list(self.weights.values())
        torch._foreach_lerp_(slow, fast, self.alpha)
        torch._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Any]:
        """The slow weights by name."""
        return dict(self.weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over slow weights."""
        for name, weight in self.weights.items():
            weight.copy_(state_dict[name])


def _positive(field: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{field}: {value}; give a number above 0")
