"""Several tasks through one network at once, each with parameters of its own.

Shapes: T tasks, K samples of a task. ``fast`` parameters have the task first, ``[T, ...]``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, layer_norm, linear, mse_loss

from lightning_custom.errors import ConfigError
from lightning_custom.precision import Bare

Parameters = Mapping[str, Tensor]
"""Parameters by name; each either as the network has it, shared by all tasks, or with the task first."""
TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [T, K, ...], targets [T, K, ...]) -> losses [T]``."""


class TaskModel:
    """A network for several tasks: ``model(inputs [T, K, ...], parameters) -> outputs [T, K, ...]``.

    ``together`` computes all tasks at once, otherwise one after another; the results are equal to rounding. All at
    once is a plain sequence of batched products where the network is an ``nn.Sequential`` of linear layers,
    activations, ``LayerNorm`` and ``Flatten``, and :func:`torch.func.vmap` for any other.

    Only the forward pass is under vmap, never a gradient: ordinary autograd differentiates what it recorded, twice if
    need be. That is faster than ``torch.func.grad`` inside vmap, and right for batch, layer and instance
    normalisation, whose second derivative is wrong there, in silence (torch 2.13; functorch #534, since 2022).
    """

    def __init__(self, model: Bare, *, together: bool) -> None:
        self.module = model.module
        self._model = model
        self._dims = {name: parameter.dim() for name, parameter in self.module.named_parameters()}
        self._is_float32 = next((part.dtype for part in self.module.parameters()), None) is torch.float32
        self._layers = list(_flat_layers(self.module)) if together else []
        self.together = together

    def __call__(self, inputs: Tensor, parameters: Parameters) -> Tensor:
        """Outputs ``[T, K, ...]`` of each task by its own parameters."""
        if self._is_float32 and inputs.dtype is torch.float64:
            raise ConfigError("tasks: inputs of float64, as NumPy makes them; give float32, or use --precision 64-true")
        fast = {name: tensor for name, tensor in parameters.items() if tensor.dim() > self._dims[name]}
        shared = {name: tensor for name, tensor in parameters.items() if name not in fast}
        if not self.together:
            outputs = [
                self._model(inputs[task], parameters={**shared, **{name: part[task] for name, part in fast.items()}})
                for task in range(len(inputs))
            ]
            _require_tensor(outputs[0])
            return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
        if self._layers and not _is_watched(self.module):
            return self._model.run(lambda tasks: self._sequence(tasks, parameters), inputs)  # type: ignore[no-any-return]

        def one_task(samples: Tensor, own: dict[str, Tensor]) -> Any:
            return self._model(samples, parameters={**shared, **own})

        try:
            with _no_fused_attention():
                return _require_tensor(vmap(one_task, randomness="different")(inputs, fast))
        except RuntimeError as error:
            if not _is_of_vmap(error):
                raise
            raise ConfigError(
                f"task_batching: vmap cannot compute this network ({' '.join(str(error).split())}); use loop"
            ) from error

    def _sequence(self, outputs: Tensor, parameters: Parameters) -> Tensor:
        for prefix, layer in self._layers:
            outputs = _TASK_BATCHED.get(type(layer), _activation)(layer, outputs, parameters, prefix)
        return outputs


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Without torch's fused layers of evaluation mode, which have no derivative: under vmap they overlook its need."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _require_tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"model: gives a {type(outputs).__name__}, where an inner loop needs one tensor; concatenate several "
            "outputs, and split them in a loss of your own"
        )
    return outputs


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _flat_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a sequence with the prefixes of their parameters; none if there is one without a rule."""
    if type(module) is not nn.Sequential:
        return
    if len(dict(module.named_parameters(remove_duplicate=False))) != len(dict(module.named_parameters())):
        return  # tied parameters have one name of several
    found: list[tuple[str, nn.Module]] = []
    # named_children leaves out a layer that comes again, such as one activation used throughout.
    for name, layer in module._modules.items():
        inner = list(_flat_layers(layer, f"{prefix}{name}.")) if type(layer) is nn.Sequential else []
        if not inner and type(layer) not in {*_TASK_BATCHED, *_ACTIVATIONS}:
            return
        found += inner or [(f"{prefix}{name}.", layer)]
    yield from found


def _linear(layer: nn.Module, inputs: Tensor, parameters: Parameters, prefix: str) -> Tensor:
    weight, bias = _own(layer, parameters, prefix, "weight"), _own(layer, parameters, prefix, "bias")
    if weight is None or weight.dim() == 2:
        outputs = linear(inputs, weight)  # type: ignore[arg-type]
        return outputs if bias is None else outputs + _beside_samples(bias, outputs, 1)
    samples = inputs.flatten(1, -2)
    if bias is None or bias.dim() == 1:
        outputs = torch.bmm(samples, weight.mT)
        outputs = outputs if bias is None else outputs + bias
    else:
        outputs = torch.baddbmm(bias.unsqueeze(1), samples, weight.mT)
    return outputs.view(*inputs.shape[:-1], -1)


def _layer_norm(layer: Any, inputs: Tensor, parameters: Parameters, prefix: str) -> Tensor:
    outputs, dims = layer_norm(inputs, layer.normalized_shape, eps=layer.eps), len(layer.normalized_shape)
    weight, bias = _own(layer, parameters, prefix, "weight"), _own(layer, parameters, prefix, "bias")
    if weight is not None:
        outputs = outputs * _beside_samples(weight, outputs, dims)
    return outputs if bias is None else outputs + _beside_samples(bias, outputs, dims)


def _flatten(layer: Any, inputs: Tensor, *_: Any) -> Tensor:
    ends = [axis + 1 if axis >= 0 else axis for axis in (layer.start_dim, layer.end_dim)]
    return inputs.flatten(*ends)


def _activation(layer: nn.Module, inputs: Tensor, *_: Any) -> Tensor:
    return layer(inputs)  # type: ignore[no-any-return]


def _own(layer: nn.Module, parameters: Parameters, prefix: str, name: str) -> Tensor | None:
    return parameters.get(prefix + name, cast("Tensor | None", getattr(layer, name)))


def _beside_samples(parameter: Tensor, outputs: Tensor, dims: int) -> Tensor:
    """``[T, ...]`` with axes of one for the samples' between; a shared parameter as it is."""
    if parameter.dim() == dims:
        return parameter
    return parameter.view(len(parameter), *[1] * (outputs.dim() - parameter.dim()), *parameter.shape[1:])


_TASK_BATCHED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flatten,
}
_ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity,
)  # fmt: skip


def per_task(loss: Callable[[Tensor, Tensor], Tensor] | None) -> TaskLoss:
    """``loss(outputs [K, ...], targets [K, ...]) -> mean`` of one task, as a loss of several: ``[T, K, ...] -> [T]``.

    None is cross-entropy where targets are classes, and the mean squared error elsewhere. That, and torch's
    ``mse_loss`` and ``cross_entropy`` by themselves, are computed for all tasks at once, others under vmap, or a task
    after another where vmap cannot. :class:`ConfigError` for a loss that is not one number of a task.
    """
    if loss is None:
        return lambda outputs, targets: (_mean_squared_errors if targets.is_floating_point() else _cross_entropies)(
            outputs, targets
        )
    if loss is mse_loss:
        return _mean_squared_errors
    if loss is cross_entropy:
        return _cross_entropies
    of_several = vmap(loss, randomness="different")

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            found: Tensor = of_several(outputs, targets)
        except RuntimeError as error:
            if not _is_of_vmap(error):
                raise
            # Such as a loss that leaves samples out by a mask. Tried anew at every call: what a trial draws is drawn
            # in a resumed run too.
            warnings.warn(f"loss: a task after another, as vmap cannot compute it ({error})", stacklevel=2)
            found = torch.stack([loss(*task) for task in zip(outputs, targets, strict=True)])
        if found.dim() > 1:
            raise ConfigError(f"loss: shape {tuple(found.shape[1:])} of a task; give the mean over its samples")
        return found

    return losses


def _is_of_vmap(error: RuntimeError) -> bool:
    """Whether vmap cannot do an operation, or a look at values, that is right without it."""
    return "vmap" in str(error) or "Batching rule" in str(error)


def _mean_squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape:
        raise ConfigError(
            f"targets: shape {tuple(targets.shape)}, but the model's outputs have {tuple(outputs.shape)}; give the same"
        )
    return (outputs - targets).square().flatten(1).mean(1)


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    # Of the integers torch takes int64 and uint8 alone.
    losses = cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1).long(), reduction="none")
    return losses.view(len(outputs), -1).mean(1)
