"""Normalisation inside an inner loop: statistics of the samples at hand, right at second order under ``vmap``.

Today's torch gives, in silence, a wrong second-order gradient when ``torch.func.vmap`` meets BatchNorm with batch
statistics, LayerNorm or affine InstanceNorm; first order, GroupNorm, RMSNorm and what is written from primitives are
right. Running statistics have a trouble of their own, with or without ``vmap``: they are written in place, so that the
result depends on the order of the tasks and on the number of processes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

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
    """
    if n is not None and n < 1:
        raise ConfigError(f"statistics_from: {n}; give the number of support samples, or None for all at hand")
    layers = [layer for layer in model.modules() if isinstance(layer, BatchStatisticsNorm)]
    before = [layer.statistics_from for layer in layers]
    try:
        for layer in layers:
            layer.statistics_from = n
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.statistics_from = value


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
    replaced: dict[nn.Module, BatchStatisticsNorm] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            continue
        norm = replaced.get(layer) or replaced.setdefault(layer, _replacement(layer))
        if not name:
            return norm
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, norm)
    return model


def _replacement(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> BatchStatisticsNorm:
    norm = BatchStatisticsNorm(layer.num_features, eps=layer.eps, affine=False)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)
