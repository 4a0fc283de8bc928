"""Small networks evaluated in NumPy: one observation at a time costs a fifth of what it does in torch.

The arrays are views of the parameters' own memory, so what an optimizer writes is seen at once and nothing is copied.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_custom.environments.arrays import Array, Observations
from lightning_custom.policies import GaussianPolicy
from lightning_custom.precision import Bare, unwrap

Forward = Callable[[Any], Any]

# Past this size torch's own kernels catch up.
_LARGEST_LAYER = 512


def acting_network(fabric: Fabric, module: nn.Module) -> Callable[[Observations], Array]:
    """``module`` for acting: observations ``[E, ...]`` to its outputs ``[E, P]``, both NumPy, without a gradient.

    In NumPy where the module is small, on the CPU and made of layers known here; in torch elsewhere.
    """
    module = unwrap(module)
    forward = numpy_forward(module)
    if forward is not None:
        return forward
    run = Bare(module, fabric.strategy.precision)

    def in_torch(observations: Observations) -> Array:
        with torch.inference_mode():
            outputs: Array = run(to_tensors(observations, fabric.device)).cpu().numpy()
        return outputs

    return in_torch


def to_tensors(observations: Observations, device: torch.device) -> Any:
    """``observations`` as tensors on ``device``, without a copy where they are there already."""
    if isinstance(observations, dict):
        return {key: torch.from_numpy(part).to(device) for key, part in observations.items()}
    return torch.from_numpy(observations).to(device)


def numpy_forward(module: nn.Module) -> Forward | None:
    """``module``'s forward pass over vectors ``[B, ...]``, or None where NumPy is not right and fast for it."""
    tensors = [*module.parameters(), *module.buffers()]
    usable = all(
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and max(tensor.shape, default=0) <= _LARGEST_LAYER
        for tensor in tensors
    )
    return _forward_of(module) if usable and tensors else None


def _forward_of(module: nn.Module) -> Forward | None:
    # By exact class, and without hooks: a subclass may do more.
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        return _linear(module)
    if type(module) is nn.Sequential:
        parts = [_forward_of(part) for part in module]
        return None if None in parts else _chain(parts)  # type: ignore[arg-type]
    if type(module) is GaussianPolicy:
        mean = _forward_of(module.mean)
        return None if mean is None else _gaussian(mean, module.log_std)
    return _ACTIVATIONS.get(type(module))


def _linear(layer: nn.Linear) -> Forward:
    weight = _view(layer.weight).T
    # Zeros that are added cost less than a branch.
    bias = np.zeros(len(weight.T), weight.dtype) if layer._parameters["bias"] is None else _view(layer.bias)
    return lambda inputs: inputs.astype(weight.dtype, copy=False) @ weight + bias


def _chain(parts: list[Forward]) -> Forward:
    def forward(inputs: Array) -> Array:
        for part in parts:
            inputs = part(inputs)
        return inputs

    return forward


def _gaussian(mean: Forward, log_std: Tensor) -> Forward:
    deviation = _view(log_std)

    def forward(inputs: Array) -> Array:
        means = mean(inputs)
        return np.concatenate([means, np.broadcast_to(deviation, means.shape)], 1)

    return forward


def _view(tensor: Tensor) -> Array:
    view: Array = tensor.detach().numpy()
    return view


_ACTIVATIONS: dict[type[nn.Module], Forward] = {
    nn.Tanh: np.tanh,
    nn.ReLU: lambda inputs: np.maximum(inputs, 0),
    nn.Identity: lambda inputs: inputs,
}
