"""A device that is not the CPU, in the CPU's memory: what a GPU refuses is refused, on a machine without one.

Tensors of the device hold one of the CPU each, whose kernels compute for them, so that a run on the device has the
numbers of one on the CPU. As on a GPU, an operation on tensors of both is an error (numbers without dimensions, indices
and copies aside), and so is an array of NumPy made of one. Not emulated: streams, pinned memory, autocast, the GPU's
own kernels.

``registered()`` gives torch the device's name, once and for good: only in a process of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_custom import flat_adam
from lightning_custom.precision import FullDouble

NAME = "emulated"
aten = torch.ops.aten
MAY_MIX = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default
}  # fmt: skip


class EmulatedTensor(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "EmulatedTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, new: "EmulatedTensor") -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As a checkpoint is read: on the CPU.
        return self.detach().cpu().__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``function`` by the CPU's kernel, its outputs where a device would have them."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, EmulatedTensor)]
    mixed = there and any(tensor.dim() for tensor in given if not isinstance(tensor, EmulatedTensor))
    if mixed and function not in MAY_MIX:
        raise RuntimeError(f"{function}: tensors of the CPU and of another device")
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    goes_there = devices[0].type == NAME if devices else bool(there)
    held_args, held_kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), moved_back((args, kwargs)))
    outputs = function(*held_args, **held_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if not goes_there:
        return outputs
    outputs = tree_map_only(Tensor, EmulatedTensor, outputs)
    return return_and_correct_aliasing(function, args, kwargs, outputs) if there else outputs


class _Accelerator(Accelerator):
    """The device as Fabric knows it."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def gru_cell(inputs: Tensor, memory: Tensor, w_i: Tensor, w_h: Tensor, b_i: Tensor, b_h: Tensor) -> Tensor:
    """In operations that every device has: torch's fused one is a GPU's alone."""
    reset_i, update_i, new_i = linear(inputs, w_i, b_i).chunk(3, 1)
    reset_h, update_h, new_h = linear(memory, w_h, b_h).chunk(3, 1)
    update = torch.sigmoid(update_i + update_h)
    new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    return new + update * (memory - new)


def lstm_cell(
    inputs: Tensor, memory: tuple[Tensor, Tensor], w_i: Tensor, w_h: Tensor, b_i: Tensor, b_h: Tensor
) -> tuple[Tensor, Tensor]:
    """Likewise."""
    keep_in, forget, new, out = (linear(inputs, w_i, b_i) + linear(memory[0], w_h, b_h)).chunk(4, 1)
    cell = torch.sigmoid(forget) * memory[1] + torch.sigmoid(keep_in) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def registered() -> None:
    """Make the device's name known to torch in this process."""

    class Module(backend_registration._DummyBackendModule):  # here, since older versions of torch have none
        """``torch.emulated``, which has the CPU's random numbers."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: Tensor, device: Any = None) -> None:
            torch.set_rng_state(state)

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())


@contextlib.contextmanager
def emulated() -> Iterator[Fabric]:
    """A Fabric on the device, in float64, within the block."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then made on the CPU and moved
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that optimizers keep their parameters
    try:
        with (
            Emulation(),
            patch.object(flat_adam, "Tensor", EmulatedTensor),
            patch.object(torch.nn.modules.rnn._VF, "gru_cell", gru_cell, create=True),
            patch.object(torch.nn.modules.rnn._VF, "lstm_cell", lstm_cell, create=True),
        ):
            strategy = SingleDeviceStrategy(device=torch.device(NAME, 0))
            yield Fabric(accelerator=_Accelerator(), strategy=strategy, plugins=[FullDouble()])
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)


def moved_back(state: Any) -> Any:
    """Plain containers with their tensors on the CPU."""
    return tree_map_only(EmulatedTensor, lambda tensor: tensor.held, state)
