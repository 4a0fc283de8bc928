"""A mean of gradients whose bits do not depend on the number of processes."""

from collections.abc import Iterable, Sequence

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares


def take_gradient_(parameters: Iterable[Tensor]) -> Tensor:
    """The gradients of ``parameters`` as one vector ``[P]``, zero where there is none; none is left behind."""
    parts = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts.append(gradient.flatten())
        parameter.grad = None
    return torch.cat(parts)


def sum_in_fixed_order_(fabric: Fabric, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Make the sum of the gradient vectors ``[P]`` of all items, here and on the other processes, the gradient.

    Each process gives those of its contiguous share of the items. All are gathered and added by pairs in the order
    of the items, (0 + 1) + (2 + 3) and so on, wherever they came from: floating-point sums depend on their order.
    Costs a transfer of every item's gradient instead of one.
    """
    sizes = [parameter.numel() for parameter in parameters]
    own = torch.stack(tuple(gradients)) if gradients else parameters[0].new_zeros((0, sum(sizes)))
    total = sum_by_pairs(gather_shares(own, fabric))
    for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def sum_by_pairs(items: Tensor) -> Tensor:
    """The sum over the first axis of ``[N, ...]``, neighbours first.

    >>> sum_by_pairs(torch.tensor([1.0, 2.0, 3.0]))
    tensor(6.)
    """
    while len(items) > 1:
        pairs = items[: len(items) // 2 * 2]
        items = torch.cat([pairs[::2] + pairs[1::2], items[len(pairs) :]])
    return items[0]
