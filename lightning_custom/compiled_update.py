"""An update of Adam for small networks, whose gradient is compiled and whose parameters are one vector."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.adam import adam

from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.errors import ConfigError
from lightning_custom.precision import bare, unwrap
from lightning_custom.state import unwrap_optimizer

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""``loss(forward, *batch) -> (total, values by name)``; ``forward`` calls the module, and the total is one number."""


class CompiledUpdate:
    """``update(*batch) -> values`` does what these lines do, up to rounding and faster where networks are small:

        optimizer.zero_grad()
        total, values = loss(bare(fabric, module), *batch)
        fabric.backward(total)
        mean_gradients_(fabric, module)
        clip_norm_(module.parameters(), max_norm)     # unless max_norm is 0
        optimizer.step()

    The loss and its gradient are one compiled graph (:class:`CompiledGradient`). Mean, norm and Adam, which cost more
    than the arithmetic where there are many small parameters, see one vector. The parameters are views of it from the
    beginning, so make this before anything that keeps their memory; Adam's averages are from the first call on, so
    restore before. A checkpoint is the same as without.

    :class:`ConfigError` for what a vector cannot serve: another optimizer than Adam with one parameter group, frozen
    parameters or several dtypes, and the loss scale of ``16-mixed``.
    """

    def __init__(
        self, fabric: Fabric, loss: Loss, module: nn.Module, optimizer: Optimizer, *, max_norm: float = 0.0
    ) -> None:
        self._fabric, self._max_norm, self._adam = fabric, max_norm, unwrap_optimizer(optimizer)
        self._parameters = dict(unwrap(module).named_parameters())
        self._require_one_vector()
        self._vector = self._joined(list(self._parameters.values())).requires_grad_()
        for parameter, view in zip(self._parameters.values(), self._views(self._vector.detach()), strict=True):
            parameter.data = view
        self._averages: dict[str, Tensor] = {}
        forward = bare(fabric, module)

        def of_vector(vector: Tensor, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            named = dict(zip(self._parameters, self._views(vector), strict=True))
            return loss(partial(forward, parameters=named), *batch)

        self._gradient = CompiledGradient(of_vector)

    def _require_one_vector(self) -> None:
        kinds = {(part.dtype, part.device, part.requires_grad) for part in self._parameters.values()}
        if type(self._adam) is not Adam or len(self._adam.param_groups) != 1 or self._adam.defaults["amsgrad"]:
            raise ConfigError("compile: needs Adam with one parameter group and no amsgrad; leave --compile out")
        if len(kinds) != 1 or not next(iter(kinds))[2]:
            raise ConfigError("compile: needs parameters of one dtype, none of them frozen; leave --compile out")
        if getattr(self._fabric.strategy.precision, "scaler", None) is not None:
            raise ConfigError("compile: 16-mixed has a loss scale, which this leaves out; use --precision bf16-mixed")

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        """The values by name, and an update of the parameters."""
        if not self._averages:
            self._join_averages()
        (gradient,), values = self._gradient.gradients(self._vector, *batch)
        with torch.no_grad():
            if self._fabric.world_size > 1:
                dist.all_reduce(gradient)
                gradient /= self._fabric.world_size
            if self._max_norm:
                norm = torch.linalg.vector_norm(gradient)
                gradient *= (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
            self._step(gradient)
        return values

    def _step(self, gradient: Tensor) -> None:
        group, averages = self._adam.param_groups[0], self._averages
        adam(
            [self._vector], [gradient], [averages["exp_avg"]], [averages["exp_avg_sq"]], [], [self._steps[0]],
            fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
        # A number each: an update without this would count in one that all share once for every parameter.
        self._steps.fill_(self._steps[0])

    def _join_averages(self) -> None:
        parameters = list(self._parameters.values())
        states = [self._adam.state[parameter] for parameter in parameters]
        steps = {float(state.get("step", 0)) for state in states}
        if len(steps) != 1:
            raise ConfigError(f"compile: parameters have had {sorted(steps)} updates; leave --compile out")
        self._steps = torch.full((len(parameters),), steps.pop(), device=self._vector.device)
        for name in ("exp_avg", "exp_avg_sq"):
            pairs = zip(parameters, states, strict=True)
            self._averages[name] = self._joined([state.get(name, torch.zeros_like(part)) for part, state in pairs])
            for state, step, view in zip(states, self._steps, self._views(self._averages[name]), strict=True):
                state |= {"step": step, name: view}

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.detach().flatten() for part in parts])

    def _views(self, vector: Tensor) -> list[Tensor]:
        shapes = [parameter.shape for parameter in self._parameters.values()]
        parts = vector.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
