"""A function compiled together with its gradient, gradients of gradients inside it included."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor import compile as compile_graph
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_custom.errors import ConfigError

Argument = Tensor | Mapping[str, Tensor]
Function = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""``function(*arguments) -> (total, values by name)``, the total a single number."""


class CompiledGradient:
    """``function`` with the same arguments and results, but faster, and with the total's gradient computed at once.

    ``torch.compile`` cannot compile a gradient that is differentiated again. Here the function and its gradient by
    every argument that requires one are recorded first, down to the operations that autograd calls, and the record is
    compiled. ``total.backward()`` then only hands the gradient over, multiplied by what comes from above, so that
    accumulation works. A loss scale would come too late for float16
    (:func:`~lightning_custom.precision.refuse_loss_scale`). The values carry no gradient.

    Arguments are tensors, or mappings of tensors by name. Shapes, and whatever the function decides in Python, are
    fixed at the first call with these shapes, which takes seconds to minutes. :class:`ConfigError` where the function
    cannot be recorded.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._value_names: tuple[str, ...] = ()

    def __call__(self, *arguments: Argument) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, whose gradient is known already, and the values."""
        tensors, values = _flat(arguments), list[Tensor]()
        total = _HandOver.apply(self._compiled_for(tensors, arguments), values, *tensors)
        return total, dict(zip(self._value_names, values, strict=True))

    def gradients(self, *arguments: Argument) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The gradients by the arguments that require one, in their order, and the values; autograd sees nothing."""
        tensors = _flat(arguments)
        _, gradients, values = self._compiled_for(tensors, arguments)([tensor.detach() for tensor in tensors])
        return gradients, dict(zip(self._value_names, values, strict=True))

    def _compiled_for(self, tensors: Sequence[Tensor], arguments: Sequence[Argument]) -> Callable[..., Any]:
        key = tuple((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors)
        if key not in self._compiled:
            self._compiled[key] = self._compile(arguments)
        return self._compiled[key]

    def _compile(self, arguments: Sequence[Argument]) -> Callable[..., Any]:
        def with_gradient(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            with torch.enable_grad():
                total, values = self._function(*_like(arguments, leaves))
            self._value_names = tuple(values)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
            return total.detach(), list(gradients), [value.detach() for value in values.values()]

        examples = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in _flat(arguments)]
        try:
            recorded = make_fx(with_gradient)(examples)
        except ConfigError:  # the function's own, with a remedy of its own
            raise
        except Exception as error:
            raise ConfigError(f"compile: the gradient cannot be recorded ({error}); leave --compile out") from error
        # Not torch.compile, whose guards would look at every argument of every call: a third of a small step.
        compiled: Callable[..., Any] = compile_graph(recorded, cast("Any", [examples]))
        return compiled


def _flat(arguments: Sequence[Argument]) -> list[Tensor]:
    return [
        tensor
        for argument in arguments
        for tensor in ([argument] if isinstance(argument, Tensor) else argument.values())
    ]


def _like(arguments: Sequence[Argument], tensors: Sequence[Tensor]) -> list[Argument]:
    """``tensors`` in the places of those of ``arguments``."""
    remaining = iter(tensors)
    return [
        next(remaining) if isinstance(argument, Tensor) else {name: next(remaining) for name in argument}
        for argument in arguments
    ]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: Callable[..., Any], values: list[Tensor], *tensors: Tensor) -> Any:
        # Plain tensors: what requires a gradient would pass through autograd's own wrapper, a quarter of a small step.
        total, gradients, found = compiled([tensor.detach() for tensor in tensors])
        # One of them may be the total itself, which autograd is about to mark.
        values += [value.detach() for value in found]
        ctx.wanted = [tensor.requires_grad for tensor in tensors]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        gradients = iter(torch._foreach_mul(ctx.saved_tensors, above[0]))
        return (None, None, *(next(gradients) if wanted else None for wanted in ctx.wanted))
