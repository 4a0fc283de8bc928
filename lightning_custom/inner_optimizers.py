"""Optimizers of an inner loop: an update is a differentiable function from parameters to parameters."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]
Rates = float | Mapping[str, Tensor]
"""One learning rate, or one for each parameter by name, a number or of the parameter's shape."""
Memory = dict[str, Tensor]
"""What an optimizer keeps from step to step; empty at first."""


class InnerOptimizer(Protocol):
    """``(parameters, gradients, rates, memory) -> (parameters, memory)``; nothing is changed in place."""

    def __call__(
        self, parameters: Parameters, gradients: Parameters, rates: Rates, memory: Memory
    ) -> tuple[Parameters, Memory]:
        """One update."""
        ...


def sgd(parameters: Parameters, gradients: Parameters, rates: Rates, memory: Memory) -> tuple[Parameters, Memory]:
    """Gradient descent, ``p - rate g``."""
    return _descend(parameters, gradients, rates), memory


def momentum(
    parameters: Parameters, gradients: Parameters, rates: Rates, memory: Memory, *, decay: float = 0.9
) -> tuple[Parameters, Memory]:
    """Gradient descent along ``v = decay v + g`` (Polyak 1964; as :class:`torch.optim.SGD`, whose first v is g)."""
    velocity = {name: memory[name] * decay + part if name in memory else part for name, part in gradients.items()}
    return _descend(parameters, velocity, rates), velocity


def adam(
    parameters: Parameters,
    gradients: Parameters,
    rates: Rates,
    memory: Memory,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Parameters, Memory]:
    """Adam (Kingma and Ba 2015), with ``m / sqrt(v + eps^2)`` for ``m / (sqrt(v) + eps)``.

    The square root's own derivative is infinite at zero, where a unit that is off has its gradient; within the sum it
    is finite, and the update differs by less than eps relative to sqrt(v).
    """
    count = memory.get("count", torch.zeros((), dtype=torch.float64)) + 1
    new: Memory = {"count": count}
    updates = {}
    for name, gradient in gradients.items():
        mean = (1 - betas[0]) * gradient
        square = (1 - betas[1]) * gradient.square()
        if f"{name}.mean" in memory:
            mean = mean + betas[0] * memory[f"{name}.mean"]
            square = square + betas[1] * memory[f"{name}.square"]
        new[f"{name}.mean"], new[f"{name}.square"] = mean, square
        corrected = square / (1 - betas[1] ** count)
        updates[name] = mean / (1 - betas[0] ** count) / (corrected + eps**2).sqrt()
    return _descend(parameters, updates, rates), new


def _descend(parameters: Parameters, directions: Parameters, rates: Rates) -> Parameters:
    if isinstance(rates, (int, float)):
        return {name: part.add(directions[name], alpha=-rates) for name, part in parameters.items()}
    return {name: part - rates[name] * directions[name] for name, part in parameters.items()}


INNER_OPTIMIZERS: dict[str, InnerOptimizer] = {"sgd": sgd, "momentum": momentum, "adam": adam}
"""By the name that a config has for them."""


def clip_each_task(gradients: Parameters, max_norm: float) -> Parameters:
    """Gradients ``[T, ...]`` scaled down where a task's norm over all of them is above ``max_norm``; differentiable."""
    squares = torch.stack([part.reshape(len(part), -1).square().sum(1) for part in gradients.values()]).sum(0)
    # Where the norm is zero its derivative would not be a number.
    norms = (squares + 1e-24).sqrt()
    scale = (max_norm / norms).clamp(max=1)
    return {name: part * scale.view(-1, *[1] * (part.dim() - 1)) for name, part in gradients.items()}


class LearnedRates(nn.Module):
    """An inner learning rate for every number of every parameter, learned with them (Meta-SGD, Li et al. 2017, eq. 2).

    >>> LearnedRates({"weight": torch.ones(2, 3)}, 0.1).by_name()["weight"].shape
    torch.Size([2, 3])
    """

    def __init__(self, parameters: Mapping[str, Tensor], start: float) -> None:
        super().__init__()
        self.names = tuple(parameters)
        self.rates = nn.ParameterList(torch.full_like(part, start, requires_grad=True) for part in parameters.values())

    def by_name(self) -> dict[str, Tensor]:
        """The rates by the name of their parameter."""
        parts: Iterable[Tensor] = self.rates
        return dict(zip(self.names, parts, strict=True))
