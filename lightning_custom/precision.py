"""Forward passes whose gradients can be differentiated again, right in every precision."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.fabric.wrappers import _FabricModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

from lightning_custom.distributed import averages_by_itself
from lightning_custom.errors import ConfigError


class FullDouble(DoublePrecision):
    """``64-true`` that stays in float64: Lightning's own casts a module's outputs back to float32."""

    def convert_output(self, data: Any) -> Any:
        """Leave the outputs as they are."""
        return data


class Bare:
    """A module's own forward pass under Fabric's precision, without Fabric's wrapper around it.

    The wrapper refuses ``torch.autograd.grad`` in mixed precision, ``torch.func.functional_call`` on it leaves
    substituted tensors behind, and its hooks cost about 0.2 ms a call on a CPU. A loop that differentiates
    through a module itself therefore calls it like this:

        discriminate = bare(fabric, discriminator)
        logits = discriminate(images)                        # the module's own parameters
        logits = discriminate(images, parameters=adapted)    # a mapping by name in their place

    In ``bf16-true`` and ``64-true`` floating-point inputs are cast to the dtype of the module's parameters; outputs
    in half precision come back in float32, so that losses and penalties are computed there.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self.module = module
        self._precision = precision
        self._plain = type(precision) is Precision  # 32-true
        self._autocast = isinstance(precision, MixedPrecision)
        # An average of weights stays in float32 under bf16-true, so the precision does not know a module's dtype.
        self._dtype = next((part.dtype for part in module.parameters() if part.is_floating_point()), None)

    def __call__(self, *inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The module's output for ``inputs``, with ``parameters`` (by name) in place of its own if given."""
        return self.run(partial(self._forward, parameters=parameters), *inputs)

    def run(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """What another way of computing the module's output, ``forward(*inputs)``, gives in its precision."""
        if self._plain:
            return forward(*inputs)
        if not self._autocast:
            inputs = apply_to_collection(inputs, Tensor, self._cast)
        is_float32 = not self._autocast and self._dtype is torch.float32
        with nullcontext() if is_float32 else self._precision.forward_context():
            outputs = forward(*inputs)
        return apply_to_collection(outputs, Tensor, _at_least_float32)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _forward(self, *inputs: Any, parameters: Mapping[str, Tensor] | None) -> Any:
        if parameters is None:
            return self.module(*inputs)
        return functional_call(self.module, dict(parameters), inputs)


def bare(fabric: Fabric, module: nn.Module) -> Bare:
    """The raw module behind ``fabric.setup``, as a callable that keeps Fabric's precision.

    :class:`ConfigError` under a strategy whose wrapper does the averaging: gradients would stay local, in silence.
    """
    if averages_by_itself(fabric):
        raise ConfigError(
            f"strategy: {type(fabric.strategy).__name__} averages gradients inside its own wrapper, which this loop "
            "bypasses; use --strategy auto, whose gradients are averaged explicitly"
        )
    return Bare(unwrap(module), fabric.strategy.precision)


def narrowed(fabric: Fabric, batch: Any) -> Any:
    """``batch`` with what is float64, as NumPy makes it, in torch's default dtype, unless the run is in ``64-true``."""
    if isinstance(fabric.strategy.precision, DoublePrecision):
        return batch
    return apply_to_collection(batch, Tensor, _at_most_default)


def refuse_loss_scale(fabric: Fabric, reason: str) -> None:
    """:class:`ConfigError` for ``16-mixed``, in a loop that does with gradients what a loss scale does not survive."""
    if getattr(fabric.strategy.precision, "scaler", None) is not None:
        raise ConfigError(f"precision: 16-mixed has a loss scale, {reason}; use bf16-mixed")


def unwrap(module: nn.Module) -> nn.Module:
    """The module that was given to ``fabric.setup``; a module that is not wrapped comes back as it is."""
    return module.module if isinstance(module, _FabricModule) else module


def _at_most_default(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.dtype is torch.float64 else tensor


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
