"""The quadratic problems of the aggregators, each solved exactly as non-negative least squares on unit gradients.

One solver for all: the active-set method of Lawson and Hanson 1974, ch. 23, which ends after finitely many steps. Its
answer is checked against the conditions of optimality, and what fails them is an error. SciPy's ``nnls`` does not
serve: since 1.15 it returns some points that are far from optimal without a word (its issue 25389; a few in a hundred
for nearly orthogonal gradients). Shapes as in :mod:`.gram`.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.optimize import brentq

from lightning_custom.multitask.gram import FloatArray, TaskGradients

_DEPENDENT = 1e-11
"""Columns nearer to dependence are dependent: they differ by float64's rounding, as smaller spreads were cut before."""

_DEPENDENT_AFTER_A_CUT = 1e-6
"""The same where a spread was cut: of opposed gradients up to the root of RANK_TOLERANCE is left in the span of the
others, and would be a direction of its own to large multiples of both."""


def away_from_conflict(point: FloatArray, gradients: TaskGradients) -> FloatArray:
    """What to add to ``point [R]`` for the nearest one that conflicts with no task, as coefficients ``[A]``.

    The projection onto the dual cone ``{d: g_i . d >= 0 for all i}`` is ``point + units @ coefficients``, with
    coefficients of at least 0 (Moreau).
    """
    length = float(np.linalg.norm(point))
    if length == 0 or (point @ gradients.units >= 0).all():
        return np.zeros(len(gradients.norms))
    return length * _shortest(_non_negative(gradients.units, -point / length, gradients), gradients)


def smallest_in_hull(gradients: TaskGradients) -> FloatArray:
    """Coefficients ``[A]`` of the point of least norm in the convex hull of the gradients."""
    return float(gradients.norms.min()) * _hull_point(np.zeros(len(gradients.units)), gradients)


def largest_worst_gain(c: float, gradients: TaskGradients) -> FloatArray:
    """What to add to the mean gradient for ``argmax_d min_i g_i . d`` with ``|d - mean| <= c |mean|``: ``[A]``.

    With a penalty ``p / 2 |d - mean|^2`` in the place of the ball, ``p d`` is the point of least norm in the hull of
    the gradients moved by ``p mean``. Its distance falls with ``p``, so one root gives the penalty that stands for
    the ball. Optimal to the last digits; where gradients cancel and the root is none, or near 0, to 1e-8.
    """
    mean = gradients.mean
    length = float(np.linalg.norm(mean))
    if length == 0 or c == 0:
        return np.zeros(len(gradients.norms))
    guess: NDArray[np.bool_] | None = None

    def step(log_penalty: float) -> tuple[FloatArray, float]:
        nonlocal guess
        penalty = np.exp(log_penalty)
        coefficients = _hull_point(penalty / length * mean, gradients, guess) / penalty
        guess = coefficients > 0
        return coefficients, float(np.linalg.norm(gradients.units @ coefficients))

    def excess(log_penalty: float) -> float:
        distance = step(log_penalty)[1]
        return (distance - c) / (distance + c)

    lowest, highest = np.log(1e-8), np.log(2 / c * gradients.norms.max() / gradients.norms.min())
    if excess(lowest) <= 0:
        return length * _shortest(step(lowest)[0], gradients)
    coefficients, distance = step(brentq(excess, lowest, highest, xtol=1e-11))
    if not abs(distance / c - 1) < 1e-6:
        raise gradients.failure(f"the step from the mean has {distance / c:.6g} of its length")
    return length * _shortest(coefficients * c / distance, gradients)


def _hull_point(shift: FloatArray, gradients: TaskGradients, guess: NDArray[np.bool_] | None = None) -> FloatArray:
    """``argmin |g / m + shift|`` over g in the convex hull, m the smallest norm, as coefficients ``[A]`` of g / m.

    Where ``x = t a`` with ``a`` in the simplex, ``|sum x_i v_i|^2 + k^2 (1 - sum x_i)^2`` is least over ``t`` at a
    value that rises with ``|sum a_i v_i|``: so its minimum over ``x >= 0``, once divided by ``sum x_i``, is the point.
    """
    shares = gradients.norms.min() / gradients.norms
    # All numbers stay near 1: as k is about the norm of the result, and columns are scaled.
    row = max(1.0, float(np.linalg.norm(shift))) * shares
    scale = np.maximum(1, row)
    matrix = np.vstack([gradients.units + shift[:, None] * shares, row]) / scale
    target = np.zeros(len(matrix))
    target[-1] = 1
    solution = _non_negative(matrix, target, gradients, guess) / scale
    point: FloatArray = solution / (solution @ shares)
    return point


def _shortest(coefficients: FloatArray, gradients: TaskGradients) -> FloatArray:
    # Of dependent gradients, large multiples could cancel but for what the truncation to rank R has left out.
    independent = len(gradients.units) == len(coefficients)
    return coefficients if independent else gradients.coefficients(gradients.units @ coefficients)


def _non_negative(
    matrix: FloatArray, target: FloatArray, gradients: TaskGradients, guess: NDArray[np.bool_] | None = None
) -> FloatArray:
    """``argmin_{x >= 0} |matrix x - target|`` for columns and a target of about unit length.

    ``guess [A]`` says where ``x`` is thought to be above zero; by default where it would rise from zero.
    """
    was_cut = len(gradients.units) < len(gradients.norms)
    # Of a spread near the first limit some subsets pass and some do not, which may lead nowhere.
    for dependent in (_DEPENDENT_AFTER_A_CUT, _DEPENDENT) if was_cut else (_DEPENDENT,):
        solution, off = _active_set(matrix, target, dependent, guess)
        if off <= 1e-9 + 1e-14 * solution.sum():
            return solution
    raise gradients.failure(f"the active-set method ended {off:.1e} off the optimum")


def _active_set(
    matrix: FloatArray, target: FloatArray, dependent: float, guess: NDArray[np.bool_] | None
) -> tuple[FloatArray, float]:
    """The solution, and how far it is from the conditions of optimality."""
    # Any columns whose least-squares solution is above zero are a start; a good guess saves most of the steps.
    free = target @ matrix > 0 if guess is None else guess.copy()
    trial = _least_squares(matrix, target, free, dependent)
    while trial is not None and (free & (trial <= 0)).any():
        free &= trial > 0
        trial = _least_squares(matrix, target, free, dependent)
    if trial is None:
        free[:] = False
    solution: FloatArray = np.zeros(len(free)) if trial is None else trial
    barred = np.zeros_like(free)
    for _ in range(100 + 10 * len(free)):
        slope = (target - matrix @ solution) @ matrix
        slope[free | barred] = 0
        entering = slope.argmax()
        if slope[entering] <= np.finfo(float).eps:
            break
        free[entering] = True
        trial = _least_squares(matrix, target, free, dependent)
        if trial is None or trial[entering] <= 0:
            # The slope was rounding: this column depends on the others, or would leave at once.
            free[entering], barred[entering] = False, True
            continue
        while (leaving := free & (trial <= 0)).any():
            shares = np.full(len(free), np.inf)
            shares[leaving] = solution[leaving] / (solution - trial)[leaving]
            solution = solution + shares.min() * (trial - solution)
            free &= shares > shares.min()
            solution[~free] = 0
            if (trial := _least_squares(matrix, target, free, dependent)) is None:
                return solution, np.inf
        solution, barred[:] = trial, False
    slope = (target - matrix @ solution) @ matrix
    # A column that is nearly dependent is nearly at its optimum.
    return solution, max((slope - barred * dependent).max(), np.abs(slope[free]).max(initial=0))


def _least_squares(
    matrix: FloatArray, target: FloatArray, free: NDArray[np.bool_], dependent: float
) -> FloatArray | None:
    """The ``x`` of least residual that is zero where not ``free``; None where the free columns are dependent."""
    solution, columns = np.zeros(len(free)), matrix[:, free]
    rows, count = columns.shape
    if count > rows:
        return None
    if count:
        pivots, workspace = np.zeros(count, np.int32), 4 * count + 64 * (count + 1)
        _, values, _, rank, _ = lapack.dgelsy(columns, target, pivots, dependent, workspace)
        if rank < count:
            return None
        solution[free] = values[:count]
    return solution
