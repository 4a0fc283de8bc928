"""Normalisation inside an inner loop: statistics of the samples at hand, right at second order under ``vmap``.

Today's torch gives, in silence, a wrong second-order gradient when ``torch.func.vmap`` meets BatchNorm with batch
statistics, LayerNorm or affine InstanceNorm; first order, GroupNorm, RMSNorm and what is written from primitives are
right. Running statistics have a trouble of their own, with or without ``vmap``: they are written in place, so that the
result depends on the order of the tasks and on the number of processes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_custom.distributed import sum_over_processes
from lightning_custom.errors import ConfigError


class BatchStatisticsNorm(nn.Module):
    """Batch normalisation by the samples at hand, in training and evaluation alike: ``[B, C]`` or ``[B, C, ...]``.

    No running statistics and no buffers. Equals ``nn.BatchNorm2d(track_running_stats=False)`` (Ioffe and Szegedy 2015,
    algorithm 1), from primitives that every transform of ``torch.func`` differentiates rightly. Half precision is
    normalised in float32. :class:`ConfigError` where a channel has one value only, whose deviation is 0.
    """

    statistics_from: int | None
    """Where set to n, mean and variance come from the first n samples alone; see :func:`statistics_from`."""

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.statistics_from = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs with mean 0 and variance 1 in each channel, times the weight, plus the bias."""
        seen = len(inputs) if self.statistics_from is None else self.statistics_from
        self._check(inputs, seen)
        over = (0, *range(2, inputs.dim()))
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        centred = values - values[:seen].mean(over, keepdim=True)
        scale = torch.rsqrt(centred[:seen].square().mean(over, keepdim=True) + self.eps)
        if self.weight is None or self.bias is None:
            return (centred * scale).to(inputs.dtype)
        channels = (1, -1, *(1 for _ in over[1:]))
        return (centred * (scale * self.weight.view(channels)) + self.bias.view(channels)).to(inputs.dtype)

    def _check(self, inputs: Tensor, seen: int) -> None:
        if inputs.dim() < 2 or inputs.shape[1] != self.num_features:
            raise ConfigError(f"inputs: shape {tuple(inputs.shape)}; give [samples, {self.num_features}, ...]")
        if seen > len(inputs):
            raise ConfigError(
                f"statistics_from: {seen}, but there are {len(inputs)} samples; give the support's number"
            )
        if seen * math.prod(inputs.shape[2:]) == 1:
            raise ConfigError(
                f"inputs: shape {tuple(inputs.shape)} with statistics of one value a channel; give more samples, or "
                "use GroupNorm"
            )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


@contextmanager
def statistics_from(model: nn.Module, n: int | None) -> Iterator[None]:
    """Within the block every :class:`BatchStatisticsNorm` of ``model`` takes its statistics from the first n samples.

    So the query is normalised by the support, and no query sample sees another (not transductive), in

        with statistics_from(model, len(support)):
            logits = functional_call(model, adapted, (torch.cat([support, query]),))[len(support) :]

    The published figures of MAML are transductive: all query samples of a task share their statistics, None here.
    :class:`ConfigError` for an n beside torch's own layers that take the statistics of all samples.
    """
    if n is not None and n < 1:
        raise ConfigError(f"statistics_from: {n}; give the number of support samples, or None for all at hand")
    if n is not None and (others := _of_all_samples(model)):
        raise ConfigError(
            f"batch_statistics: support, but {', '.join(others)} can only take those of all samples; call "
            "with_batch_statistics(model)"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, BatchStatisticsNorm)]
    before = [layer.statistics_from for layer in layers]
    try:
        for layer in layers:
            layer.statistics_from = n
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.statistics_from = value


def _of_all_samples(model: nn.Module) -> list[str]:
    return [
        f"{name or 'the model itself'} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
    ]


def unsafe_norms(model: nn.Module) -> list[str]:
    """Names, with their class, of the layers in training mode that keep running statistics.

    BatchNorm of any kind, and InstanceNorm where it tracks; in evaluation mode their statistics are constants.
    """
    return [
        f"{name or 'the model itself'} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None
    ]


def require_safe_norms(model: nn.Module) -> None:
    """:class:`ConfigError` where :func:`unsafe_norms` finds a layer."""
    names = unsafe_norms(model)
    if names:
        raise ConfigError(
            f"model: running statistics in {', '.join(names)}; an inner loop writes them in place, which makes the "
            "result depend on the order of tasks and on the processes; make them with track_running_stats=False, or "
            "call with_batch_statistics(model)"
        )


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm1d, 2d and 3d by :class:`BatchStatisticsNorm`, in place, and return the model.

    The new layers hold the same parameters, not copies, so that optimizers keep theirs; running statistics are
    dropped. Where the model itself is such a layer its replacement is returned.
    """
    return _with_replaced(model, _BATCH_NORMS, _replacement)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _replacement(layer: nn.Module) -> BatchStatisticsNorm:
    layer = cast("nn.BatchNorm2d", layer)
    norm = BatchStatisticsNorm(layer.num_features, eps=layer.eps, affine=False)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)


def _with_replaced(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], replacement: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, kinds):
            continue
        norm = replaced.get(layer) or replaced.setdefault(layer, replacement(layer))
        if not name:
            return norm
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, norm)
    return model


Statistics = Literal["batch", "collect", "running"]
"""``batch``: those of the samples at hand; ``collect``: the same, remembered; ``running``: the mean of remembered ones.
"""


class PerStepNorm(BatchStatisticsNorm):
    """Batch normalisation with a weight, a bias and running statistics for each step of an inner loop.

    Weights and biases are ``[N, C]`` for N steps, and so are ``running_mean`` and ``running_var``. Which of the N sets
    a pass uses, and whose statistics, says :func:`set_inner_step_`; running statistics move in
    :func:`update_running_statistics_` alone, never in a pass. MAML++, Antoniou et al. 2019, section 4 (BNWB and BNRS).
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, num_steps: int, *, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps, affine=False)
        self.weight = nn.Parameter(torch.ones(num_steps, num_features))
        self.bias = nn.Parameter(torch.zeros(num_steps, num_features))
        self.register_buffer("running_mean", torch.zeros(num_steps, num_features))
        self.register_buffer("running_var", torch.ones(num_steps, num_features))
        self.inner_step = 0
        self.statistics: Statistics = "batch"
        self.collected: dict[int, list[Tensor]] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs, normalised by the statistics and scaled by the weight and bias of the inner step."""
        channels = (1, -1, *(1 for _ in inputs.shape[2:]))
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if self.statistics == "running":
            mean, variance = (part[self.inner_step].view(channels) for part in (self.running_mean, self.running_var))
            centred = values - mean
        else:
            seen = len(inputs) if self.statistics_from is None else self.statistics_from
            self._check(inputs, seen)
            over = (0, *range(2, inputs.dim()))
            mean = values[:seen].mean(over, keepdim=True)
            centred = values - mean
            variance = centred[:seen].square().mean(over, keepdim=True)
            if self.statistics == "collect":
                size = centred[:seen].numel() // self.num_features
                found = torch.stack([mean.flatten(), variance.flatten() * size / (size - 1)])
                _Collect.apply(found.detach(), self)
        scale = torch.rsqrt(variance + self.eps) * self.weight[self.inner_step].view(channels)
        return (centred * scale + self.bias[self.inner_step].view(channels)).to(inputs.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_features}, steps={len(self.weight)}, eps={self.eps}"


class _Collect(torch.autograd.Function):
    """Hands a layer the statistics ``[2, C]`` of a pass; under vmap, whose values cannot leave it, those of all tasks.

    The layer is an argument because containers would be copied on the way.
    """

    @staticmethod
    def forward(found: Tensor, layer: PerStepNorm) -> Tensor:
        layer.collected.setdefault(layer.inner_step, []).append(found.unsqueeze(0))
        return found.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, found: Tensor, layer: PerStepNorm) -> tuple[Tensor, None]:
        layer.collected.setdefault(layer.inner_step, []).append(found.movedim(in_dims[0], 0))
        return found.new_zeros(()), None


def with_per_step_norm(model: nn.Module, num_steps: int) -> nn.Module:
    """Replace batch normalisation of any kind by :class:`PerStepNorm`, in place, and return the model.

    Every step starts from the weight and bias that the layer had, frozen where they were. Where the model itself is
    such a layer its replacement is returned. A layer that is per step already stays.
    """
    return _with_replaced(model, (*_BATCH_NORMS, BatchStatisticsNorm), partial(_per_step, num_steps))


def _per_step(num_steps: int, layer: nn.Module) -> PerStepNorm:
    if isinstance(layer, PerStepNorm):
        return layer
    layer = cast("nn.BatchNorm2d", layer)
    norm = PerStepNorm(layer.num_features, num_steps, eps=layer.eps)
    if layer.weight is not None:
        norm.to(layer.weight)
        with torch.no_grad():
            norm.weight.copy_(layer.weight.expand_as(norm.weight))
            norm.bias.copy_(layer.bias.expand_as(norm.bias))
        norm.weight.requires_grad_(layer.weight.requires_grad)
        norm.bias.requires_grad_(layer.bias.requires_grad)
    return norm.train(layer.training)


def per_step_norms(model: nn.Module) -> dict[str, PerStepNorm]:
    """The layers of ``model`` that have a set of parameters and statistics for each inner step, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PerStepNorm)}


def set_inner_step_(model: nn.Module, step: int, statistics: Statistics = "batch") -> None:
    """From here on every :class:`PerStepNorm` of ``model`` is that of inner step ``step``, at most its last."""
    for layer in per_step_norms(model).values():
        layer.inner_step, layer.statistics = min(step, len(layer.weight) - 1), statistics


@torch.no_grad()
def update_running_statistics_(fabric: Fabric, model: nn.Module, *, momentum: float = 0.1) -> None:
    """Move the running statistics of each step towards the mean of what its passes collected, and forget that.

    The mean is over tasks, passes and processes, so that neither their order nor their number changes it; torch's own
    layers move at every pass. Steps without a pass keep theirs. Every process calls it, with the same steps.
    """
    for layer in per_step_norms(model).values():
        for step in sorted(layer.collected):
            found = torch.cat(layer.collected.pop(step))
            count = found.new_full((1, found.shape[2]), float(len(found)))
            total = sum_over_processes(fabric, torch.cat([found.sum(0), count]))
            mean, variance = total[:2] / total[2]
            layer.running_mean[step].lerp_(mean.to(layer.running_mean.dtype), momentum)
            layer.running_var[step].lerp_(variance.to(layer.running_var.dtype), momentum)
