"""Several processes that give the run of one: explicit averaging, cutting by process, acting together."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_custom.errors import CheckpointError, ConfigError

T = TypeVar("T")


class ExplicitStrategy(DDPStrategy):
    """Launches and connects processes like DDP, but wraps no module and averages nothing by itself.

    :meth:`setup_module` broadcasts parameters and buffers from process 0. Gradients are averaged where the loop
    says so, by :func:`mean_gradients_`; this is right for gradients that come from ``autograd.grad`` or
    ``torch.func`` too, which DDP's hooks never see.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), **kwargs: Any) -> None:
        super().__init__(timeout=timeout, **kwargs)
        self._backward_sync_control = None

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Make every process start from process 0's parameters and buffers."""
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, src=0)
        return module


def averages_by_itself(fabric: Fabric) -> bool:
    """Whether the strategy (ddp, fsdp, ...) averages gradients during the backward pass."""
    return not isinstance(fabric.strategy, (ExplicitStrategy, SingleDeviceStrategy))


def mean_gradients_(fabric: Fabric, *modules: nn.Module) -> None:
    """Replace every gradient by its mean over processes; call once before each optimizer step.

    One buffer for each dtype holds all trainable parameters in their fixed order, and beside them a mask of which
    have a gradient: absent on every process stays absent, absent on some counts as zero there. Gradients in
    half precision are summed in float32. With one process, or where the strategy averages, nothing happens.
    """
    if fabric.world_size == 1 or averages_by_itself(fabric):
        return
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups.setdefault(_reduction_dtype(parameter.dtype), []).append(parameter)
    for dtype, parameters in groups.items():
        _mean_gradients_of_one_dtype_(parameters, dtype, fabric.world_size)


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.no_grad()
def _mean_gradients_of_one_dtype_(parameters: list[nn.Parameter], dtype: torch.dtype, world_size: int) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    present = [parameter.grad is not None for parameter in parameters]
    buffer = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=parameters[0].device)
    *means, mask = buffer.split([*sizes, len(sizes)])
    means = [mean.view_as(parameter) for mean, parameter in zip(means, parameters, strict=True)]
    if any(present):
        torch._foreach_copy_(
            [mean for mean, here in zip(means, present, strict=True) if here],
            [parameter.grad for parameter in parameters if parameter.grad is not None],
        )
    mask.copy_(torch.tensor(present))
    dist.all_reduce(buffer)
    buffer.div_(world_size)
    # The mask is read, which waits for the device, only by a process that misses a gradient itself.
    anywhere = present if all(present) else mask.ne(0).tolist()
    for parameter, mean, somewhere in zip(parameters, means, anywhere, strict=True):
        if parameter.grad is not None:
            parameter.grad.copy_(mean)
        elif somewhere:
            parameter.grad = mean.to(parameter.dtype, copy=True)


def share(size: int, fabric: Fabric, field: str) -> int:
    """This process's part of a global ``size``; :class:`ConfigError` where it does not divide.

    ``field`` is the name of the setting in the message.
    """
    part, rest = divmod(size, fabric.world_size)
    if rest or part == 0:
        lower, upper = part * fabric.world_size, (part + 1) * fabric.world_size
        remedy = f"{upper}" if part == 0 else f"{lower} or {upper}"
        raise ConfigError(
            f"{field}: {size} does not divide among {fabric.world_size} processes; use {remedy}, or other devices"
        )
    return part


def take_share(tensor: Tensor, fabric: Fabric) -> Tensor:
    """This process's contiguous part of a global batch ``[B, ...]``, on its device.

    Parts differ by at most one where ``B`` does not divide, process 0's being the larger.
    """
    return fabric.to_device(tensor.tensor_split(fabric.world_size)[fabric.global_rank])


def gather_shares(tensor: Tensor, fabric: Fabric) -> Tensor:
    """The global batch ``[B, ...]`` from every process's :func:`take_share`, on every process; no gradient.

    A loss takes :func:`global_batch`.
    """
    if fabric.world_size == 1:
        return tensor.detach()
    sizes = all_objects(fabric, len(tensor))
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over processes, on every process; no gradient."""
    total = tensor.detach().clone()
    if fabric.world_size > 1:
        dist.all_reduce(total)
    return total


class _MeanOverProcesses(torch.autograd.Function):
    """The mean over processes; being linear and symmetric, it is its own derivative, of any order."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mean: Tensor = _MeanOverProcesses.apply(gradient)
        return mean


def global_mean(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over its entries and over processes, which hold equally many, as a scalar; differentiable.

    For a loss that bends a statistic of the batch: there the mean over processes of local losses is not the loss of
    the global batch. Gradients that come through it are right after :func:`mean_gradients_`. Each call waits for the
    other processes, in the backward pass too, so all must make it.
    """
    mean = tensor.mean()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    result: Tensor = _MeanOverProcesses.apply(mean)
    return result


class _Gathered(torch.autograd.Function):
    """The parts of all processes, one behind the other; its derivative is :class:`_SummedPart`, and the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        part: Tensor = _SummedPart.apply(gradient)
        return part


class _SummedPart(torch.autograd.Function):
    """This process's part of the sum over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole: Tensor = _Gathered.apply(gradient)
        return whole


def global_batch(tensor: Tensor) -> Tensor:
    """The global batch ``[B, ...]`` from the parts of all processes, which are of one size; differentiable.

    For a loss that compares samples, such as a contrastive one. Each process may take the loss of its own samples
    against the whole batch, or all of them the whole loss: gradients that come through it are right after
    :func:`mean_gradients_`. Each call waits for the other processes, in the backward pass too, so all must make it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    result: Tensor = _Gathered.apply(tensor)
    return result


def all_objects(fabric: Fabric, value: T) -> list[T]:
    """Every process's ``value``, in order of rank, on every process."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return values


def process_item(fabric: Fabric) -> str:
    """The name of this process's item among those of all processes, for state that is stored by process."""
    return f"process-{fabric.global_rank:05d}"


def divide_items(fabric: Fabric, items: Mapping[str, T]) -> list[T]:
    """Which of the stored ``items`` this process goes on with: its own, on the number of processes that stored them.

    On another number they are dealt out in turn, so that a process may get several, or none.
    """
    return [items[name] for name in sorted(items)][fabric.global_rank :: fabric.world_size]


def together(fabric: Fabric, action: Callable[[], T]) -> T:
    """Do ``action`` on every process; where it fails on one, all raise, naming the process.

    A failure that one process alone knows of would leave the others waiting in their next collective. A
    :class:`ConfigError` stays one; anything else becomes a :class:`CheckpointError`.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as exception:
        failure = exception
    for rank, report in enumerate(all_objects(fabric, None if failure is None else _describe(failure))):
        if report is not None:
            kind, text = report
            raise kind(text if fabric.world_size == 1 else f"process {rank}: {text}") from failure
    return result  # type: ignore[return-value]


def _describe(failure: Exception) -> tuple[type[Exception], str]:
    if isinstance(failure, (ConfigError, CheckpointError)):
        return type(failure), str(failure)
    return CheckpointError, f"{type(failure).__name__}: {failure}"


def first_process(fabric: Fabric, action: Callable[[], T]) -> T:
    """Do ``action`` on process 0 alone and return its result on all; where it fails, all raise."""
    result = together(fabric, lambda: action() if fabric.global_rank == 0 else None)
    return fabric.broadcast(result)  # type: ignore[return-value]
