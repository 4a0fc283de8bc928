"""Aggregators that solve for the weights, and the names of all; see :mod:`.aggregator`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.aggregator import Aggregator
from lightning_custom.multitask.gram import RANK_TOLERANCE, FloatArray, TaskGradients
from lightning_custom.multitask.quadratic import away_from_conflict, largest_worst_gain, smallest_in_hull
from lightning_custom.multitask.surgery import GradDrop, GradVac, PCGrad


class MGDA:
    """The point of least norm in the convex hull of the gradients.

    Desideri 2012; Sener and Koltun 2018, eq. 3. Its weights are at least 0 and sum to 1: the scale of a mean, and at
    most the norm of the smallest gradient. So a task whose gradient is zero has all the weight, and nothing moves.
    Exact, by one non-negative least-squares problem, about ``O(T^3)``. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        if len(gradients.tasks) < gradients.num_tasks:
            still = (gram.diagonal() == 0).double()
            return still / still.sum()
        return gradients.weights(smallest_in_hull(gradients))


@dataclass(frozen=True)
class CAGrad:
    """The direction that is best for the task it serves least, at most ``c`` times the mean's norm from the mean.

    Liu et al. 2021, eq. 3 and algorithm 1, without the rescaling of their code: the scale of the mean, 1 + c times at
    most. With ``c = 0`` the mean; with a large ``c`` the direction of :class:`MGDA`. Where gradients cancel so that
    no direction serves all, it is the nearest to the mean that harms none (to 1e-8), if the ball has one. About 12
    non-negative least-squares problems, ``O(T^3)`` each. No state.
    """

    c: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.c <= 100:
            raise ConfigError(f"c: {self.c}; give a number from 0 to 100, or use MGDA")

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        step = largest_worst_gain(self.c, gradients)
        return gradients.weights(gradients.norms / gradients.num_tasks + step)


class UPGrad:
    """The mean of the gradients, each projected onto the directions that conflict with no task.

    Quinton and Rey 2024, eq. 3 and proposition 1. The scale of the mean, and the mean itself where nothing conflicts.
    At most T non-negative least-squares problems, ``O(T^4)``. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        summed = gradients.norms.copy()
        if (gradients.cosines < 0).any():
            for norm, unit in zip(gradients.norms, gradients.units.T, strict=True):
                summed += norm * away_from_conflict(unit, gradients)
        return gradients.weights(summed / gradients.num_tasks)


class DualProj:
    """The mean gradient, projected onto the directions that conflict with no task.

    Lopez-Paz and Ranzato 2017, eq. 11, with the mean in the place of the new task's gradient. The scale of the mean,
    and the mean itself where it conflicts with nothing. One non-negative least-squares problem, ``O(T^3)``. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        step = away_from_conflict(gradients.mean, gradients)
        return gradients.weights(gradients.norms / gradients.num_tasks + step)


class IMTLG:
    """The weighted sum, of weights that sum to 1, whose projections onto all unit gradients are equal.

    Liu et al. 2021, "Towards impartial multi-task learning", section 3.1. The scale of a mean, but weights may be
    negative, and for gradients of very different norms the common projection may be too: the direction then ascends
    every loss. Where only zero has equal projections (opposed gradients), it is zero. :class:`SolverError` where the
    weights cannot sum to 1. One eigendecomposition, ``O(T^3)``. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        if not len(gradients.tasks):
            return gradients.weights(gradients.norms)
        equal, missed = _equal_projections(gradients)
        # In the limit of nearly dependent gradients only the part that no combination reaches is left.
        unscaled = missed if missed @ missed > _UNREACHED * len(missed) else equal
        shares = unscaled / gradients.norms
        if not abs(shares.sum()) > 1e-12 * np.abs(shares).sum():
            raise gradients.failure("the weights of equal projections sum to zero and cannot be scaled to 1")
        return gradients.weights(unscaled / shares.sum())


class ConFIG:
    """The direction with the same cosine to every gradient, as long as the sum of their projections onto it.

    Liu et al. 2024, eq. 2 and 3: the scale of the sum. Their pseudo-inverse of the unit gradients needs the Gram matrix
    only. Where no direction has equal cosines it is theirs of least squares, and zero where that is zero (opposed
    gradients). One eigendecomposition, ``O(T^3)``. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        equal, missed = _equal_projections(gradients)
        if len(missed) - missed @ missed <= _UNREACHED * len(missed):
            return gradients.weights(np.zeros_like(equal))
        point = gradients.units @ equal
        length_squared = point @ point
        return gradients.weights(equal * (gradients.norms @ (point @ gradients.units)) / length_squared)


_UNREACHED = 1e-10
"""Squared share of a vector that counts as rounding, after a truncation at RANK_TOLERANCE."""


def _equal_projections(gradients: TaskGradients) -> tuple[FloatArray, FloatArray]:
    """Coefficients ``[A]`` of the point whose projections onto the unit gradients are nearest to 1, and what it lacks.

    The lack ``[A]`` lies in the null space of the cosines, is 0 where the projections are 1, and has a squared norm of
    at most A.
    """
    units = gradients.units
    # (U^T)^+ 1, with the rows of units orthogonal.
    point = units.sum(1) / np.square(units).sum(1)
    return gradients.coefficients(point), 1 - point @ units


class NashMTL:
    """Nash's bargaining solution: the weights with ``G w = 1 / w``, so that every task gains in proportion.

    Navon et al. 2022, claim 3.1. The direction has the norm ``sqrt(T)`` whatever the gradients' (1 for one task), and
    does not change when one is scaled; the ``max_norm`` of their code is a factor on the learning rate.
    :class:`SolverError` where gradients cancel, to float32's rounding: then there is no such point. Newton's method,
    up to 10 steps of ``O(T^3)``, more where gradients nearly cancel. No state: it needs no start.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        return gradients.weights(self._bargain(gradients))

    def _bargain(self, gradients: TaskGradients) -> FloatArray:
        # C a = 1 / a is where a^T C a / 2 - sum log a is least: self-concordant, so that damped steps always end well.
        cosines, sizes = gradients.cosines, np.abs(gradients.cosines)
        point: FloatArray = 1 / np.sqrt(sizes.sum(1))
        for _ in range(1000):
            slope = point * (cosines @ point) - 1
            largest = (point * (sizes @ point)).max(initial=0)
            if np.abs(slope).max(initial=0) <= 1e-12 + 4 * np.finfo(float).eps * largest:
                return point
            if largest > 1 / RANK_TOLERANCE:
                raise gradients.failure("the gradients cancel, so that no direction serves every task")
            step = np.linalg.solve(point[:, None] * cosines * point + np.eye(len(point)), -slope)
            decrement = np.sqrt(-slope @ step)
            point = point * (1 + (step if decrement < 0.25 else step / (1 + decrement)))
        raise gradients.failure("Newton's method did not converge in 1000 steps")


@dataclass(frozen=True)
class AlignedMTL:
    """The weighted sum of the gradients made orthogonal and of one norm, with the least change of their directions.

    Senushkin et al. 2023, algorithm 1: the gradients' singular values are all set to the smallest above zero.
    ``task_weights`` are the paper's ``w``, one a task; the default of 1 each gives the scale of a sum, of gradients
    that all have the smallest singular value for a norm. ``O(T^3)``. No state.
    """

    task_weights: Sequence[float] | None = None

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        if self.task_weights is not None and len(self.task_weights) != len(gram):
            raise ConfigError(f"task_weights: {len(self.task_weights)} of them, but {len(gram)} tasks; give one a task")
        if not len(gradients.tasks):
            return gradients.weights(gradients.norms)
        wanted = np.ones(len(gram)) if self.task_weights is None else np.asarray(self.task_weights, dtype=np.float64)
        aligned = self._align(gradients)
        return gradients.weights(gradients.coefficients(aligned @ wanted[gradients.tasks]))

    def _align(self, gradients: TaskGradients) -> FloatArray:
        """The aligned gradients as columns ``[R, A]``, in the coordinates of ``gradients.units``."""
        # Jacobi's method (job F: any scales of rows and columns) keeps the digits of small singular values beside large
        # ones, which the usual decompositions lose when tasks differ by many orders of magnitude.
        columns = (gradients.units * gradients.norms).T
        values, left, right, scale, _, info = lapack.dgejsv(columns, joba=2, jobu=0, jobv=0)
        if info != 0:
            raise gradients.failure(f"the singular values did not converge (LAPACK's info {info})")
        smallest = values[-1] * scale[0] / scale[1]
        aligned: FloatArray = smallest * (right @ left[:, : len(values)].T)
        return aligned


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "graddrop": GradDrop,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "imtl-g": IMTLG,
    "config": ConFIG,
    "nash-mtl": NashMTL,
    "aligned-mtl": AlignedMTL,
}
"""The aggregators by the names that a config uses; all have defaults, but ``gradvac`` takes the number of tasks."""
