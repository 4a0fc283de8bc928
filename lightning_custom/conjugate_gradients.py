"""Conjugate gradients for several systems of equations at once.

Shapes: T systems, P unknowns of each.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor | None = None, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Solutions ``x [T, P]`` of ``A x = right [T, P]``, and what is left of each system, ``|right - A x| [T]``.

    ``product`` is ``x [T, P] -> A x [T, P]``, every A symmetric and positive definite; it is called ``steps`` times,
    and once more to begin from a ``start`` other than zero. Hestenes and Stiefel 1952, section 3.

    A system ends early, where it is, once nothing is left of it, or in a direction along which its A is not positive:
    no step there lowers the error. No value is looked at, so a GPU does not wait.
    """
    solution = torch.zeros_like(right) if start is None else start
    residual = right if start is None else right - product(start)
    direction, left = residual, _dot(residual, residual)
    for _ in range(steps):
        image = product(direction)
        curvature = _dot(direction, image)
        goes_on = (curvature > 0) & (left > 0)
        length = torch.where(goes_on, left / curvature, 0)
        solution, residual = solution + length * direction, residual - length * image
        before, left = left, _dot(residual, residual)
        # A direction of zero has no curvature, so that a system that has ended stays so.
        direction = torch.where(goes_on, residual + (left / before) * direction, 0)
    return solution, left.sqrt().squeeze(1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1, keepdim=True)
