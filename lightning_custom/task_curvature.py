"""Gradients of several tasks' losses as vectors, and products with their Hessians.

Shapes: T tasks, P numbers in the parameters of one. Parameters have the task first, ``[T, ...]``.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def as_vectors(parts: Sequence[Tensor]) -> Tensor:
    """Parts ``[T, ...]`` as vectors ``[T, P]``, in float32 or wider."""
    vectors = torch.cat([part.reshape(len(part), -1) for part in parts], 1)  # of a scalar, [T], too
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def as_parts(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Vectors ``[T, P]`` as parts of the shapes and dtypes of ``like``."""
    pieces = vectors.split([part[0].numel() for part in like], 1)
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, like, strict=True)]


def gradient_vectors(losses: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The gradient of each task's loss ``[T]`` by its own parameters, ``[T, P]``."""
    return as_vectors(_gradients([losses.sum()], list(parameters.values())))


def hessian_product(losses: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradients ``[T, P]``, and ``vectors [T, P] -> Hessian times vector [T, P]`` for each task's loss ``[T]``.

    By a second differentiation of the gradient (Pearlmutter 1994): a product costs about as much as a gradient or two,
    and no matrix is made. The graph of the loss lives as long as the product does.
    """
    parts = list(parameters.values())
    slopes = _gradients([losses.sum()], parts, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        # A slope without a graph depends on nothing.
        pairs = [pair for pair in zip(slopes, as_parts(vectors, parts), strict=True) if pair[0].requires_grad]
        if not pairs:
            return torch.zeros_like(vectors)
        curved, directions = zip(*pairs, strict=True)
        return as_vectors(_gradients(curved, parts, directions, retain_graph=True))

    return as_vectors(slopes).detach(), product


def _gradients(
    of: Sequence[Tensor],
    by: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """As :func:`torch.autograd.grad`, zero where there is no dependence."""
    return torch.autograd.grad(of, by, along, retain_graph, create_graph, allow_unused=True, materialize_grads=True)
