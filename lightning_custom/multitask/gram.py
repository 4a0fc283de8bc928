"""What the Gram matrix knows of the task gradients: their norms, their cosines, and themselves in at most T dimensions.

Shapes: T tasks, P parameters, A <= T tasks whose gradient is not zero, R <= A their rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_custom.errors import NonFiniteError, SolverError

FloatArray = NDArray[np.float64]

RANK_TOLERANCE = 1e-13
"""Eigenvalues of the cosine matrix below this share of the largest count as zero.

A few times the square of float32's rounding: two gradients that differ by less differ by rounding.
"""

_CHUNK = 2**18


class TaskNotFiniteError(NonFiniteError):
    """The gradient of some ``tasks`` is not finite: their numbers, or their names."""

    def __init__(self, tasks: Sequence[int | str]) -> None:
        super().__init__(f"gradient of task {', '.join(map(str, tasks)) or '?'} is not finite")
        self.tasks = tasks


@contextmanager
def tasks_named(names: Sequence[int | str]) -> Iterator[None]:
    """Within the block, :class:`TaskNotFiniteError` has the ``names`` of the tasks and not their numbers."""
    try:
        yield
    except TaskNotFiniteError as error:
        raise TaskNotFiniteError([names[int(task)] for task in error.tasks]) from error


def gram_matrix(jacobian: Tensor) -> Tensor:
    """``J J^T`` of the task gradients ``jacobian [T, P]``, in float64 on the CPU: ``[T, T]``.

    Products of float32 numbers are exact in float64, so that cosines hold to 1e-16 whatever the scales of the tasks.
    Summed over slices of P, which keeps the float64 copy small; ends in the one transfer from the device.
    """
    # MPS has no float64.
    device = torch.device("cpu") if jacobian.device.type == "mps" else jacobian.device
    gram = torch.zeros(len(jacobian), len(jacobian), dtype=torch.float64, device=device)
    for part in jacobian.split(_CHUNK, dim=1):
        exact = part.to(device).double()
        gram.addmm_(exact, exact.T)
    return gram.cpu()


@dataclass(frozen=True)
class TaskGradients:
    """The task gradients as far as their Gram matrix tells, scale and angle apart.

    Everything is solved for coefficients on the *unit* gradients, so that tasks whose gradients differ by many orders
    of magnitude cost no digits. Tasks whose gradient is zero are left out: no direction concerns them.
    """

    method: str
    """Who reads them, for errors."""
    num_tasks: int
    """T, those without a gradient included."""
    tasks: NDArray[np.intp]
    """The numbers of the A tasks that have one."""
    norms: FloatArray
    """``[A]``"""
    cosines: FloatArray
    """``[A, A]``"""

    @classmethod
    def from_gram(cls, gram: Tensor, method: str) -> "TaskGradients":
        """Read a Gram matrix ``[T, T]``; :class:`TaskNotFiniteError` names the tasks whose gradient is not finite."""
        matrix: FloatArray = gram.detach().to("cpu", torch.float64).numpy()
        squares = matrix.diagonal()
        if not np.isfinite(matrix).all():
            raise TaskNotFiniteError(np.flatnonzero(~np.isfinite(squares)).tolist())
        tasks = np.flatnonzero(squares > 0)
        norms = np.sqrt(squares[tasks])
        cosines = matrix[np.ix_(tasks, tasks)] / norms / norms[:, None]
        return cls(method, len(matrix), tasks, norms, cosines)

    @cached_property
    def units(self) -> FloatArray:
        """The unit gradients as columns ``[R, A]``, in an orthogonal basis of their span, smallest spread first."""
        eigenvalues, basis = np.linalg.eigh(self.cosines)
        kept = eigenvalues > RANK_TOLERANCE * eigenvalues.max(initial=0)
        factor: FloatArray = np.sqrt(eigenvalues[kept])[:, None] * basis[:, kept].T
        return factor

    @property
    def mean(self) -> FloatArray:
        """The mean gradient over all T tasks, in the coordinates of :attr:`units`: ``[R]``."""
        mean: FloatArray = self.units @ self.norms / self.num_tasks
        return mean

    def coefficients(self, point: FloatArray) -> FloatArray:
        """The smallest ``[A]`` with ``units @ coefficients = point [R]``."""
        # The rows of units are orthogonal, by its making.
        smallest: FloatArray = (point / np.square(self.units).sum(1)) @ self.units
        return smallest

    def weights(self, coefficients: FloatArray) -> Tensor:
        """From coefficients on the unit gradients ``[A]`` to weights on the gradients ``[T]``."""
        weights = torch.zeros(self.num_tasks, dtype=torch.float64)
        weights[torch.from_numpy(self.tasks)] = torch.from_numpy(coefficients / self.norms)
        return weights

    def failure(self, reason: str) -> SolverError:
        """The error for a method that has no answer for these gradients."""
        gram = self.cosines * self.norms * self.norms[:, None]
        return SolverError(
            f"{self.method} on {self.num_tasks} tasks: {reason} (condition number of the Gram matrix "
            f"{np.linalg.cond(gram):.1e}, of the cosines {np.linalg.cond(self.cosines):.1e})"
        )
