"""An update of a small network whose gradient is compiled."""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.errors import ConfigError
from lightning_custom.flat_adam import FlatAdam
from lightning_custom.gradients import clip_norm_
from lightning_custom.precision import bare, refuse_loss_scale, unwrap

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""``loss(forward, *batch) -> (total, values by name)``; ``forward`` calls the module, and the total is one number."""


class CompiledUpdate:
    """``update(*batch) -> values`` does what these lines do, up to rounding and faster where networks are small:

        optimizer.zero_grad()
        total, values = loss(bare(fabric, module), *batch)
        fabric.backward(total)
        mean_gradients_(fabric, module)
        clip_norm_([optimizer.vector], max_norm)     # unless max_norm is 0
        optimizer.step()

    The loss and its gradient are one compiled graph (:class:`CompiledGradient`), a function of the vector that
    ``optimizer``, a flattened :class:`FlatAdam`, holds all parameters in. A checkpoint is the same as without.

    :class:`ConfigError` where the optimizer does not have all of the module's parameters, and for the loss scale of
    ``16-mixed``.
    """

    def __init__(
        self, fabric: Fabric, loss: Loss, module: nn.Module, optimizer: FlatAdam, *, max_norm: float = 0.0
    ) -> None:
        refuse_loss_scale(fabric, "which --compile leaves out of the gradient")
        named = dict(unwrap(module).named_parameters())
        own = {id(parameter) for parameter in optimizer.parameters}
        if {id(parameter) for parameter in named.values()} != own:
            raise ConfigError("compile: needs one optimizer with all parameters, none frozen; leave --compile out")
        self._fabric, self._max_norm, self._adam = fabric, max_norm, optimizer
        names = {id(parameter): name for name, parameter in named.items()}
        forward = bare(fabric, module)

        def of_vector(vector: Tensor, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            parts = zip(optimizer.parameters, optimizer.views(vector), strict=True)
            return loss(partial(forward, parameters={names[id(part)]: view for part, view in parts}), *batch)

        self._gradient = CompiledGradient(of_vector)
        self._vector = optimizer.vector.view_as(optimizer.vector).requires_grad_()

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        """The values by name, and an update of the parameters."""
        (gradient,), values = self._gradient.gradients(self._vector, *batch)
        if self._fabric.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self._fabric.world_size
        if self._max_norm:
            self._vector.grad = gradient
            clip_norm_([self._vector], self._max_norm)
        self._adam.step_along(gradient)
        return values
