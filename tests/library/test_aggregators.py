import itertools
import sys
import textwrap
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch

from lightning_custom.errors import ConfigError, NonFiniteError, SolverError
from lightning_custom.multitask import aggregator as interface
from lightning_custom.multitask import gram as gram_module
from lightning_custom.multitask import quadratic
from lightning_custom.multitask.aggregator import GramAggregator, aggregate
from lightning_custom.multitask.aggregators import (
    AGGREGATORS,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    NashMTL,
    UPGrad,
)
from lightning_custom.multitask.gram import gram_matrix
from lightning_custom.multitask.methods import make_method
from lightning_custom.multitask.surgery import GradDrop, GradVac, PCGrad
from lightning_custom.state import capture, mismatches, restore_

CASES = [
    pytest.param(num_tasks, condition, scaled, id=f"{num_tasks}-{condition:.0e}-{'scaled' if scaled else 'plain'}")
    for num_tasks in (2, 3, 8)
    for condition in (1e1, 1e6, 1e12)
    for scaled in (False, True)
]
SOLVERS = {name: make for name, make in AGGREGATORS.items() if name not in ("pcgrad", "gradvac", "graddrop")}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def task_gradients(num_tasks, condition=10.0, scaled=False, seed=0):
    """Gradients ``[T, T + 3]`` whose Gram matrix has a condition number, before norms from 1e-8 to 1e8."""
    numpy = np.random.default_rng([num_tasks, round(np.log10(condition)), scaled, seed])
    left = np.linalg.qr(numpy.normal(size=(num_tasks, num_tasks)))[0]
    right = np.linalg.qr(numpy.normal(size=(num_tasks + 3, num_tasks)))[0]
    rows = left * np.geomspace(1, condition**-0.5, num_tasks) @ right.T
    if scaled:
        rows *= 10.0 ** numpy.permutation(np.linspace(-8, 8, num_tasks))[:, None]
    return torch.tensor(rows)


def make(name, num_tasks):
    return GradVac(num_tasks) if name == "gradvac" else AGGREGATORS[name]()


def weights_of(aggregator, rows, seed=0):
    weights = aggregator.weights(gram_matrix(rows), rng(seed))
    assert weights.shape == (len(rows),)
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    return weights


def size_of_terms(weights, rows):
    """The rounding of a weighted sum of rows is relative to this."""
    return float(weights.abs() @ rows.norm(dim=1))


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def unit_cosine(first, second):
    # torch's own adds 1e-8 to the norms.
    return first @ second / first.norm() / second.norm()


# --- the Gram matrix and the direction


def test_gram_of_float32_rows_is_that_of_float64_in_slices(monkeypatch):
    rows = torch.randn(3, 1000, generator=rng()) * torch.tensor([[1e-8], [1.0], [1e8]])
    exact = rows.double() @ rows.double().T
    monkeypatch.setattr(gram_module, "_CHUNK", 300)
    gram = gram_matrix(rows)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, exact, rtol=1e-13, atol=0)
    assert ((rows @ rows.T).double() / exact - 1).abs().max() > 1e-8  # in float32 it would not be


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_direction_is_the_weighted_sum_in_the_dtype_of_the_rows(dtype, tolerance):
    rows = torch.randn(3, 50, generator=rng()).to(dtype)
    direction, weights = aggregate(UPGrad(), rows, rng())
    assert direction.dtype == dtype
    torch.testing.assert_close(direction.double(), weights @ rows.double(), rtol=tolerance, atol=tolerance)


def test_own_aggregator_of_the_docstring_has_equal_norms():
    source = interface.__doc__.split("class with that one method:\n\n")[1].split("\n\nWhat changes")[0]
    namespace = {}
    exec(textwrap.dedent(source), namespace)
    own = namespace["Normalised"]()
    assert isinstance(own, GramAggregator)
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    direction, _ = aggregate(own, rows, rng())
    torch.testing.assert_close(direction, torch.tensor([1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_one_task_alone_gets_its_gradient(name):
    rows = torch.tensor([[3e-5, 4e-5]])
    direction, _ = aggregate(make(name, 1), rows, rng())
    factor = {"cagrad": 1.4, "nash-mtl": 1 / 5e-5}.get(name, 1.0)  # (1 + c) and unit length, by their definitions
    torch.testing.assert_close(direction, factor * rows[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_task_without_gradient_takes_no_part(name):
    rows = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 2.0, 1.0]], dtype=torch.float64)
    direction, weights = aggregate(make(name, 3), rows, rng())
    alone, alone_weights = aggregate(make(name, 2), rows[[0, 2]], rng())
    if name == "mgda":
        assert weights.tolist() == [0, 1, 0]  # the least norm of all
        return
    if name == "cagrad":  # the mean is smaller by 2/3, and so is the ball
        alone = alone * 2 / 3
    if name in ("upgrad", "dualproj"):
        alone = alone * 2 / 3
    torch.testing.assert_close(direction, alone, rtol=1e-10, atol=1e-12)
    if weights is not None:
        assert weights[1] == 0
        assert alone_weights.ne(0).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_any_gradient_nothing_moves(name):
    direction, _ = aggregate(make(name, 3), torch.zeros(3, 4), rng())
    assert direction.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_equal_gradients_keep_their_direction(name):
    gradient = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    direction, _ = aggregate(make(name, 4), gradient.repeat(4, 1), rng())
    factor = {"pcgrad": 4, "gradvac": 4, "graddrop": 4, "config": 4, "cagrad": 1.4, "nash-mtl": 2 / 3}.get(name, 1)
    if name == "aligned-mtl":  # one singular value, 2 |g|, and four times a quarter of its vector
        factor = 4
    torch.testing.assert_close(direction, factor * gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 1e6])
@pytest.mark.parametrize("name", sorted(AGGREGATORS.keys() - {"nash-mtl", "graddrop"}))
def test_opposed_gradients_cancel_or_stay_on_their_line(name, ratio):
    rows = torch.tensor([[1.0, 2.0], [-ratio, -2 * ratio]], dtype=torch.float64)
    direction, _ = aggregate(make(name, 2), rows, rng())
    along = {"cagrad": (1 - ratio) / 2 * 0.6, "aligned-mtl": 0.0}.get(name, 0.0)
    if name == "aligned-mtl":  # rank 1: both along the one singular vector, by their shares of it
        along = 1 - ratio
    torch.testing.assert_close(direction, along * rows[0], rtol=1e-7, atol=1e-9 * ratio)


def test_gradients_that_are_not_finite_are_refused():
    rows = torch.ones(3, 4)
    rows[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="gradient of task 1 is not finite"):
        aggregate(MGDA(), rows, rng())
    rows[0] = 0
    with pytest.raises(NonFiniteError, match="gradient of task 1 is not finite"):
        aggregate(MGDA(), rows, rng())
    with pytest.raises(NonFiniteError, match="direction"):
        aggregate(GradDrop(), rows, rng())


def test_wrong_settings_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"jacobian: shape \(3,\); give a row a task"):
        aggregate(MGDA(), torch.ones(3), rng())
    with pytest.raises(ConfigError, match="c: -1; give a number from 0 to 100"):
        CAGrad(c=-1)
    with pytest.raises(ConfigError, match="leak: 2; give a share"):
        GradDrop(leak=2)
    with pytest.raises(ConfigError, match="num_tasks: 0; give at least 1"):
        GradVac(0)
    with pytest.raises(ConfigError, match="num_tasks: 3, but there are gradients of 2 tasks"):
        aggregate(GradVac(3), torch.ones(2, 4), rng())
    with pytest.raises(ConfigError, match="task_weights: 1 of them, but 2 tasks"):
        aggregate(AlignedMTL(task_weights=[1.0]), torch.ones(2, 4), rng())


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_the_tasks_does_not_matter(name):
    rows = task_gradients(5, 1e3, scaled=True)
    order = torch.tensor([3, 0, 4, 1, 2])
    weights, permuted = weights_of(make(name, 5), rows), weights_of(make(name, 5), rows[order])
    scale = weights.abs() * rows.norm(dim=1)
    assert ((permuted - weights[order]).abs() * rows.norm(dim=1)[order]).max() <= 1e-9 * scale.max()


@pytest.mark.parametrize("name", sorted(AGGREGATORS.keys() - {"graddrop"}))
def test_scale_of_all_gradients_passes_to_the_direction(name):
    rows = task_gradients(4, 1e2)
    weights, scaled = weights_of(make(name, 4), rows), weights_of(make(name, 4), 1e5 * rows)
    expected = 1e-5 * weights if name == "nash-mtl" else weights  # its direction has no scale
    torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=0)


# --- projections onto the dual cone, and the hull


def brute_force_projection(point, rows):
    """The nearest to ``point`` without conflict: the one active set whose multipliers and constraints all hold."""
    best = None
    for count in range(len(rows) + 1):
        for active in itertools.combinations(range(len(rows)), count):
            normals = unit(rows)[list(active)].T
            step = normals @ torch.linalg.lstsq(normals, point[:, None]).solution[:, 0] if active else 0 * point
            candidate = point - step
            feasible = (unit(rows) @ candidate).min() >= -1e-9 * point.norm()
            if feasible and (best is None or (point - candidate).norm() < (point - best).norm()):
                best = candidate
    return best


@pytest.mark.parametrize("num_tasks, condition", [(2, 10.0), (3, 10.0), (3, 1e6), (5, 10.0), (5, 1e4)])
@pytest.mark.parametrize("seed", range(4))
def test_projections_are_those_of_brute_force_over_active_sets(num_tasks, condition, seed):
    rows = task_gradients(num_tasks, condition, seed=seed)
    dual = brute_force_projection(rows.mean(0), rows)
    torch.testing.assert_close(weights_of(DualProj(), rows) @ rows, dual, rtol=0, atol=1e-9)
    each = torch.stack([brute_force_projection(row, rows) for row in rows]).mean(0)
    torch.testing.assert_close(weights_of(UPGrad(), rows) @ rows, each, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [153, 577, 2194, 4120])
def test_opposed_gradients_leave_the_directions_across_them_to_the_others(seed):
    # In float32 they are opposed but for rounding, in which large multiples of both would find a direction.
    rows = torch.randn(4, 20, generator=rng(seed))
    rows[1] = -0.3 * rows[0]
    rows = rows.double()

    def across(point):
        return point - (point @ rows[0]) / rows[0].square().sum() * rows[0]

    others = torch.stack([across(row) for row in rows[2:]])
    dual = brute_force_projection(across(rows.mean(0)), others)
    torch.testing.assert_close(weights_of(DualProj(), rows) @ rows, dual, rtol=0, atol=1e-5)
    each = torch.stack([brute_force_projection(across(row), others) for row in rows]).mean(0)
    torch.testing.assert_close(weights_of(UPGrad(), rows) @ rows, each, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_dualproj_meets_the_conditions_of_a_projection(num_tasks, condition, scaled):
    for seed in range(5):
        rows = task_gradients(num_tasks, condition, scaled, seed)
        weights = weights_of(DualProj(), rows)
        direction, added = weights @ rows, weights - 1 / num_tasks
        rounding = 1e-14 * size_of_terms(weights, rows)
        assert (unit(rows) @ direction).min() >= -rounding
        assert (added * rows.norm(dim=1)).min() >= -rounding  # the step lies in the cone of the gradients
        assert abs((added @ rows) @ direction) <= 10 * rounding * size_of_terms(weights, rows)  # and is orthogonal


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_upgrad_conflicts_with_no_task(num_tasks, condition, scaled):
    harmful = 0
    for seed in range(5):
        rows = task_gradients(num_tasks, condition, scaled, seed)
        weights = weights_of(UPGrad(), rows)
        assert (unit(rows) @ (weights @ rows)).min() >= -1e-14 * size_of_terms(weights, rows)
        assert (weights >= 0).all()
        harmful += int((rows @ rows.mean(0)).min() < 0)
    assert harmful or num_tasks < 8  # the mean would do harm


def test_upgrad_is_linear_in_the_scales_of_the_tasks():
    rows, scales = task_gradients(4, 1e2), torch.rand(2, 4, 1, generator=rng(), dtype=torch.float64)
    for aggregator, linear in [(UPGrad(), True), (MGDA(), False)]:
        first, second, both = (weights_of(aggregator, s * rows) @ (s * rows) for s in (*scales, scales.sum(0)))
        assert torch.allclose(first + second, both, rtol=0, atol=1e-12) == linear


@pytest.mark.parametrize("aggregator", [UPGrad(), DualProj()])
def test_without_conflict_projections_are_the_mean(aggregator):
    rows = torch.rand(5, 7, generator=rng(), dtype=torch.float64)
    assert weights_of(aggregator, rows).tolist() == pytest.approx([0.2] * 5, rel=1e-14)


def least_norm_over_faces(gram):
    """The least squared norm in the hull, to 50 digits, over all faces."""
    with mpmath.workdps(50):
        matrix, best = mpmath.matrix(gram.tolist()), mpmath.inf
        for count in range(1, len(gram) + 1):
            for face in itertools.combinations(range(len(gram)), count):
                part = mpmath.matrix([[matrix[i, j] for j in face] for i in face])
                shares = mpmath.lu_solve(part, mpmath.ones(count, 1))
                if min(shares) >= 0:
                    best = min(best, 1 / sum(shares))
        return best


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e12])
@pytest.mark.parametrize("num_tasks, scaled", [(2, False), (2, True), (3, False), (3, True), (5, False)])
def test_mgda_has_the_least_norm_in_the_hull(num_tasks, scaled, condition):
    for seed in range(3):
        gram = gram_matrix(task_gradients(num_tasks, condition, scaled, seed))
        weights = MGDA().weights(gram, rng())
        assert weights.min() >= 0
        assert float(weights.sum()) == pytest.approx(1, rel=1e-14)
        least = least_norm_over_faces(gram)
        with mpmath.workdps(50):
            exact = mpmath.matrix(weights.tolist())
            exact = exact / sum(exact)
            squared = (exact.T * mpmath.matrix(gram.tolist()) * exact)[0]
            assert mpmath.sqrt(squared / least) - 1 < 1e-12


def frank_wolfe(gram, iterations):
    weights = torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        towards = torch.zeros_like(weights)
        towards[(gram @ weights).argmin()] = 1
        change = towards - weights
        weights = weights + (-(change @ gram @ weights) / (change @ gram @ change)).clamp(0, 1) * change
    return weights


def test_frank_wolfe_would_fail_the_test_of_mgda():
    gram = gram_matrix(task_gradients(5, 1e6))
    weights = frank_wolfe(gram, 250)
    assert float(weights @ gram @ weights) > (1 + 1e-4) * float(least_norm_over_faces(gram))


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_mgda_meets_the_conditions_of_optimality(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    weights = weights_of(MGDA(), rows)
    direction = weights @ rows
    squared = direction @ direction
    gains, rounding = rows @ direction, 1e-14 * rows.norm(dim=1) * size_of_terms(weights, rows)
    assert (gains >= squared - rounding).all()
    assert ((gains - squared).abs() <= rounding)[weights > 0].all()


@pytest.mark.parametrize("c", [1e-6, 0.4, 0.9, 1.0, 10.0])
@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_cagrad_is_optimal_by_duality(num_tasks, condition, scaled, c):
    """The gain of the worst task equals the dual's value, which bounds what any direction of the ball can do."""
    rows = task_gradients(num_tasks, condition, scaled)
    weights = weights_of(CAGrad(c), rows)
    mean, direction = rows.mean(0), weights @ rows
    radius = c * mean.norm()
    assert float((direction - mean).norm()) <= float(radius) * (1 + 1e-9) + 1e-15 * size_of_terms(weights, rows)
    shares = weights - 1 / num_tasks
    shares = shares / shares.sum()
    assert shares.min() >= 0
    in_hull = shares @ rows
    bound = in_hull @ mean + radius * in_hull.norm()
    rounding = 1e-14 * rows.norm(dim=1) * size_of_terms(weights, rows)
    assert (bound - rows @ direction <= 1e-8 * bound.abs() + rounding).all()


def test_cagrad_beats_a_dense_grid_of_its_ball():
    angles = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    for seed in range(10):
        rows = torch.randn(2, 2, generator=rng(seed), dtype=torch.float64)
        mean = rows.mean(0)
        grid = mean + 0.5 * mean.norm() * circle
        best = (grid @ rows.T).min(1).values.max()
        ours = (rows @ (weights_of(CAGrad(0.5), rows) @ rows)).min()
        assert best - 1e-12 <= ours <= best + 1e-3 * abs(best) + 1e-6


def test_cagrad_is_the_mean_at_zero_and_turns_to_mgda():
    rows = task_gradients(4, 1e2)
    assert weights_of(CAGrad(0), rows).tolist() == [0.25] * 4
    far, least = weights_of(CAGrad(100), rows) @ rows, weights_of(MGDA(), rows) @ rows
    assert float(torch.cosine_similarity(far, least, dim=0)) > 1 - 1e-3


def test_cagrad_harms_none_where_gradients_cancel():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.3, 1.0]], dtype=torch.float64)
    direction = weights_of(CAGrad(0.5), rows) @ rows
    assert float(direction[0]) == pytest.approx(0, abs=1e-7)
    assert float((direction - rows.mean(0)).norm()) <= 0.5 * float(rows.mean(0).norm())
    assert float(direction[1]) > 0.1


# --- equal projections, bargaining, alignment


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_imtlg_has_equal_projections(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    weights = weights_of(IMTLG(), rows)
    projections = unit(rows) @ (weights @ rows)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-13 * float(weights.abs().sum()))
    assert float(projections.max() - projections.min()) <= 1e-13 * size_of_terms(weights, rows)


def test_imtlg_says_that_its_weights_cannot_sum_to_one():
    # The tips of these unit vectors form an obtuse triangle, whose circumcentre lies outside: one negative share.
    units = unit(torch.tensor([[0.6, 0.0, 0.8], [-0.6, 0.0, 0.8], [0.0, 0.1, 1.0]], dtype=torch.float64))
    shares = torch.linalg.solve(units @ units.T, torch.ones(3, dtype=torch.float64))
    assert shares[2] < 0 < shares[0]
    norms = torch.stack([torch.ones_like(shares[0])] * 2 + [-shares[2] / (shares[0] + shares[1])])
    with pytest.raises(SolverError, match=r"IMTLG on 3 tasks: .* cannot be scaled to 1 \(condition number"):
        weights_of(IMTLG(), norms[:, None] * units)
    # Past that point the weights sum to 1 by a change of sign: the direction ascends, as the docstring warns.
    for factor, sign in [(2.0, 1), (0.5, -1)]:
        norms[2] = -factor * shares[2] / (shares[0] + shares[1])
        direction = weights_of(IMTLG(), norms[:, None] * units) @ (norms[:, None] * units)
        assert (units @ direction).sign().tolist() == [sign] * 3


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_config_has_equal_cosines_and_the_summed_length(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    weights = weights_of(ConFIG(), rows)
    direction = weights @ rows
    projections = unit(rows) @ direction
    rounding = 1e-14 * size_of_terms(weights, rows)
    assert float(projections.max() - projections.min()) <= 10 * rounding
    assert projections.min() > 0
    length = float((rows @ (direction / direction.norm())).sum())
    assert float(direction.norm()) == pytest.approx(length, rel=1e-14 * condition, abs=10 * rounding)


def test_config_serves_the_tasks_that_can_be_served():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    direction = weights_of(ConFIG(), rows) @ rows
    torch.testing.assert_close(direction, torch.tensor([0.0, 2.0], dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_nash_bargain_holds(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    weights = weights_of(NashMTL(), rows)
    assert weights.min() > 0
    products = weights * (rows @ (weights @ rows))  # w_i (G w)_i = 1
    rounding = 1e-15 * weights * rows.norm(dim=1) * size_of_terms(weights, rows)
    assert ((products - 1).abs() <= 1e-11 + 10 * rounding).all()
    assert float((weights @ rows).square().sum()) == pytest.approx(num_tasks, rel=1e-3 if condition > 1e9 else 1e-8)


def test_nash_does_not_see_the_scales_of_the_tasks():
    rows = task_gradients(5, 1e2)
    scaled = rows * torch.tensor([[1e-8], [1e8], [3.0], [1e4], [1e-3]], dtype=torch.float64)
    direction = weights_of(NashMTL(), rows) @ rows
    torch.testing.assert_close(weights_of(NashMTL(), scaled) @ scaled, direction, rtol=1e-9, atol=1e-12)
    least, moved = (weights_of(MGDA(), each) @ each for each in (rows, scaled))
    assert not torch.allclose(least, moved, rtol=0.1)


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [-3.0, 0.0]], [[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]]])
def test_nash_says_that_there_is_no_bargain(rows):
    pattern = rf"NashMTL on {len(rows)} tasks: the gradients cancel.* \(condition number of the Gram matrix .*e\+|inf"
    with pytest.raises(SolverError, match=pattern):
        weights_of(NashMTL(), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_aligned_gradients_have_condition_one_and_the_smallest_singular_value(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    chosen = torch.eye(num_tasks).tolist()
    aligned = torch.stack([weights_of(AlignedMTL(choice), rows) @ rows for choice in chosen])
    with mpmath.workdps(60):
        left, values, right = mpmath.svd_r(mpmath.matrix(rows.tolist()))
        smallest = values[num_tasks - 1]
        nearest = torch.tensor(np.array((smallest * left * right).tolist(), dtype=np.float64))
    # The rounding of the Gram matrix, seen by its smallest eigenvalue: at a condition of 1e12 four digits are left.
    tolerance = 1e-14 * condition * float(smallest)
    assert float((aligned - nearest).abs().max()) <= tolerance
    singular = torch.linalg.svdvals(aligned)
    assert float(singular[0] / singular[-1]) == pytest.approx(1, rel=1e-14 * condition)
    torch.testing.assert_close(weights_of(AlignedMTL(), rows) @ rows, aligned.sum(0), rtol=0, atol=tolerance)


# --- surgery


def naive_surgery(rows, keys, adjust):
    """Each row, adjusted to every other in the order of its keys, and their sum."""
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        current = row.clone()
        for j in keys[i].argsort().tolist():
            if j != i:
                current = adjust(current, i, j)
        total += current
    return total


@pytest.mark.parametrize("num_tasks, condition, scaled", CASES)
def test_pcgrad_is_surgery_on_the_vectors(num_tasks, condition, scaled):
    rows = task_gradients(num_tasks, condition, scaled)
    keys = torch.rand(num_tasks, num_tasks, dtype=torch.float64, generator=rng(3))

    def project(current, i, j):
        return current - (current @ rows[j]).clamp(max=0) / (rows[j] @ rows[j]) * rows[j]

    expected = naive_surgery(rows, keys, project)
    weights = weights_of(PCGrad(), rows, seed=3)
    torch.testing.assert_close(weights @ rows, expected, rtol=0, atol=1e-13 * size_of_terms(weights, rows))


def test_pcgrad_draws_every_order_alike():
    rows = task_gradients(3, 10.0, seed=1)
    generator, gram, draws = rng(), gram_matrix(rows), 800
    seen = [tuple(PCGrad().weights(gram, generator).mul(1e9).round().tolist()) for _ in range(draws)]
    outcomes = {outcome: seen.count(outcome) for outcome in set(seen)}
    assert len(outcomes) in (2, 4, 8)  # two orders for each of three tasks, of which some make no difference
    expected = draws / len(outcomes)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in outcomes.values())


def test_gradvac_is_vaccination_of_the_vectors_and_remembers():
    vaccine, generator = GradVac(3, beta=0.3), rng(5)
    targets = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(6):
        rows = task_gradients(3, 10.0, scaled=step % 2 == 1, seed=step) + (0 if step % 2 else 0.3)
        keys = torch.rand(3, 3, dtype=torch.float64, generator=rng(100 + step))

        def vaccinate(current, i, j, rows=rows):
            cosine = unit_cosine(current, rows[j])
            target = targets[i, j].clone()
            targets[i, j] = 0.7 * target + 0.3 * cosine
            if cosine >= target:
                return current
            sine, target_sine = (1 - cosine**2).sqrt(), (1 - target**2).sqrt()
            added = current.norm() * (target * sine - cosine * target_sine) / (rows[j].norm() * target_sine)
            reached = current + added * rows[j]
            assert float(unit_cosine(reached, rows[j])) == pytest.approx(float(target), abs=1e-6)
            return reached

        expected = naive_surgery(rows, keys, vaccinate)
        generator.manual_seed(100 + step)
        weights = vaccine.weights(gram_matrix(rows), generator)
        torch.testing.assert_close(weights @ rows, expected, rtol=0, atol=1e-7 * size_of_terms(weights, rows))
        torch.testing.assert_close(vaccine.targets, targets, rtol=0, atol=1e-7)
    assert (vaccine.targets.abs() > 0.01).sum() == 6


def test_gradvac_without_memory_is_pcgrad():
    rows = task_gradients(4, 1e2)
    vaccine = GradVac(4, beta=0.0)
    torch.testing.assert_close(weights_of(vaccine, rows, 2), weights_of(PCGrad(), rows, 2), rtol=1e-9, atol=1e-12)
    assert vaccine.targets.eq(0).all()


def test_gradvac_resumes_to_the_bit():
    @dataclass
    class State:
        aggregator: GradVac

    grams = [gram_matrix(task_gradients(3, 10.0, seed=seed)) for seed in range(4)]
    straight, stopped, resumed = (State(GradVac(3, beta=0.5)) for _ in range(3))
    whole = [straight.aggregator.weights(gram, rng(k)) for k, gram in enumerate(grams)]
    for k, gram in enumerate(grams[:2]):
        stopped.aggregator.weights(gram, rng(k))
    stored = capture(stopped)
    assert mismatches(resumed, stored, {}) == []
    restore_(resumed, stored, {})
    for k in (2, 3):
        assert torch.equal(resumed.aggregator.weights(grams[k], rng(k)), whole[k])
    forgotten = GradVac(3, beta=0.5).weights(grams[2], rng(2))
    assert not torch.equal(forgotten, whole[2])


def test_gradvac_stays_finite_when_gradients_agree_for_long():
    vaccine, gradient = GradVac(2, beta=0.9), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for _ in range(100):
        weights = weights_of(vaccine, torch.stack([gradient, gradient / 3]))
        assert weights.tolist() == pytest.approx([1, 1], rel=1e-9)
    opposed = weights_of(vaccine, torch.stack([gradient, -gradient]))
    assert opposed.isfinite().all()


def test_graddrop_keeps_one_sign_an_entry_with_the_share_of_that_sign():
    rows = torch.tensor([[1.0], [-2.5], [0.5]], dtype=torch.float64).repeat(1, 20000)
    direction, weights = aggregate(GradDrop(), rows, rng(2))
    assert weights is None
    positive, negative = float(rows[:, 0].clamp(min=0).sum()), float(rows[:, 0].clamp(max=0).sum())
    assert positive > 0 > negative
    assert set(direction.tolist()) == {positive, negative}
    share = positive / (positive - negative)
    assert float((direction == positive).double().mean()) == pytest.approx(share, abs=5 * (0.25 / 20000) ** 0.5)
    again, _ = aggregate(GradDrop(), rows, rng(2))
    other, _ = aggregate(GradDrop(), rows, rng(3))
    assert torch.equal(direction, again)
    assert not torch.equal(direction, other)


def test_graddrop_sums_entries_of_one_sign_and_leaks_towards_the_sum():
    rows = torch.tensor([[1.0, -2.0, 0.0, 3.0], [4.0, -1.0, 0.0, -5.0]])
    for seed in range(20):
        direction, _ = aggregate(GradDrop(), rows, rng(seed))
        assert direction[:3].tolist() == [5, -3, 0]
        leaking, _ = aggregate(GradDrop(leak=0.5), rows, rng(seed))
        torch.testing.assert_close(leaking, (direction + rows.sum(0)) / 2)
    through, _ = aggregate(GradDrop(leak=1.0), rows, rng())
    assert torch.equal(through, rows.sum(0))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_randomness_comes_from_the_generator_alone(name):
    rows = torch.randn(4, 30, generator=rng(1))
    before = torch.get_rng_state()
    first, _ = aggregate(make(name, 4), rows, rng(7))
    torch.manual_seed(123)
    second, _ = aggregate(make(name, 4), rows, rng(7))
    torch.set_rng_state(before)
    assert torch.equal(first, second)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.function(*arguments, **options)


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 10])
def test_cagrad_solves_about_twelve_problems_and_nash_mtl_takes_at_most_ten_steps(num_tasks, monkeypatch):
    """The figures of the page, for gradients in all directions and of any size."""
    problems, steps = Counted(quadratic._non_negative), Counted(np.linalg.solve)
    monkeypatch.setattr(quadratic, "_non_negative", problems)
    monkeypatch.setattr(np.linalg, "solve", steps)
    draw = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(100):
        sizes = torch.rand(num_tasks, 1, generator=draw, dtype=torch.float64)
        gram = gram_matrix(sizes * torch.randn(num_tasks, 50, generator=draw, dtype=torch.float64))
        problems.calls = steps.calls = 0
        CAGrad().weights(gram, draw)
        NashMTL().weights(gram, draw)
        counts.append((problems.calls, steps.calls))
    found, newton = np.array(counts).T
    assert 10 <= np.median(found) <= 13
    assert 8 <= found.min() <= found.max() <= 15
    assert 2 <= newton.max() <= 10


def test_surgery_after_the_mean_over_processes_is_not_the_mean_of_surgeries():
    first, second = (task_gradients(3, 1e2, seed=seed) for seed in (1, 2))
    for name in SOLVERS:
        right, _ = aggregate(make(name, 3), (first + second) / 2, rng())
        wrong = sum(aggregate(make(name, 3), rows, rng())[0] for rows in (first, second)) / 2
        assert float((right - wrong).norm() / right.norm()) > 1e-2, name


# --- TorchJD as an outside reference


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")  # theirs, of NashMTL
@pytest.mark.parametrize(
    "name, peer, tolerance",
    [
        ("upgrad", "UPGrad", 1e-7),
        ("dualproj", "DualProj", 1e-7),
        ("mgda", "MGDA", 1e-3),
        ("cagrad", "CAGrad", 1e-3),
        ("nash-mtl", "NashMTL", 1e-4),
        ("imtl-g", "IMTLG", 1e-12),
        ("config", "ConFIG", 1e-12),
        ("aligned-mtl", "AlignedMTL", 1e-12),
    ],
)
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_directions_are_those_of_torchjd(name, peer, tolerance, num_tasks):
    """To the accuracy of their solvers, which are set as exact as they go."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    linalg = pytest.importorskip("torchjd.linalg")
    try:
        settings = {
            "CAGrad": {"c": 0.4, "norm_eps": 0.0},
            "MGDA": {"epsilon": 1e-12, "max_iters": 20000},
            "NashMTL": {"n_tasks": num_tasks, "max_norm": 0.0, "update_weights_every": 1, "optim_niter": 100},
        }.get(peer, {})
        if peer in ("UPGrad", "DualProj"):
            settings = {"projector": linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)}
        theirs = getattr(aggregation, peer)(**settings)
    except ImportError as error:
        pytest.skip(str(error))
    rows = torch.randn(num_tasks, 40, generator=rng(num_tasks), dtype=torch.float64) + 0.1
    direction, _ = aggregate(make(name, num_tasks), rows, rng())
    reference = theirs(rows)
    if name == "aligned-mtl":
        reference = num_tasks * reference  # of the mean
    if name == "nash-mtl":  # theirs divides the Gram matrix by its norm
        reference = reference / reference.norm() * direction.norm()
    assert float((direction - reference).norm() / direction.norm()) < tolerance


def test_pcgrad_of_two_tasks_and_its_mean_of_three_are_torchjds():
    aggregation = pytest.importorskip("torchjd.aggregation")
    two, three = task_gradients(2), task_gradients(3, 10.0, seed=1)
    torch.testing.assert_close(weights_of(PCGrad(), two) @ two, aggregation.PCGrad()(two), rtol=1e-12, atol=0)
    generator, gram = rng(), gram_matrix(three)
    ours = torch.stack([PCGrad().weights(gram, generator) @ three for _ in range(400)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([aggregation.PCGrad()(three) for _ in range(400)])
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * ours.std(0) * (2 / 400) ** 0.5 + 1e-12).all()


def test_graddrop_has_the_mean_of_torchjds():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = torch.tensor([[1.0], [-2.5], [0.5]], dtype=torch.float64).repeat(1, 20000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = aggregation.GradDrop()(rows)
    ours, _ = aggregate(GradDrop(), rows, rng())
    assert set(ours.tolist()) == set(theirs.tolist())
    assert abs(float(ours.mean() - theirs.mean())) < 5 * float(ours.std()) * (2 / 20000) ** 0.5


@pytest.mark.parametrize("name, options", [("Krum", {"n_byzantine": 1, "n_selected": 2}), ("FairGrad", {"alpha": 1.0})])
def test_the_adapter_gives_what_torchjd_gives(name, options):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = task_gradients(5, 10.0)
    direction, weights = aggregate(make_method("torchjd", "abcde", {"name": name, **options}), rows, rng())
    assert torch.equal(direction, getattr(aggregation, name)(**options)(rows))
    assert weights is None


def test_what_the_adapter_draws_is_of_the_generator_and_no_other_draw_moves():
    pytest.importorskip("torchjd")
    adapter, rows = make_method("torchjd", "abc", {"name": "Random"}), task_gradients(3)
    before = torch.get_rng_state()
    first, again, other = (aggregate(adapter, rows, rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "NashMTL", "n_tasks": 3}, "NashMTL of torchjd has a state that it cannot save"),
        ({"name": "GradVac"}, "GradVac of torchjd has a state"),
        ({"name": "Nashville"}, "'Nashville' is no aggregator of torchjd"),
        ({"name": "Krum"}, "missing 1 required positional argument: 'n_byzantine'"),
        ({"name": "Krum", "n_byzantine": -1}, "n_byzantine must be non-negative"),
        ({}, "missing 1 required positional argument: 'name'"),
    ],
)
def test_what_torchjd_cannot_do_is_said_in_a_line(options, message):
    pytest.importorskip("torchjd")
    if options.get("name") == "NashMTL":
        pytest.importorskip("ecos")
    with pytest.raises(ConfigError, match=message):
        make_method("torchjd", "abc", options)


def test_without_torchjd_the_adapter_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ConfigError, match=r"pip install torchjd"):
        make_method("torchjd", "abc", {"name": "Krum", "n_byzantine": 1})
