"""Projections, ascent and search against closed forms, a solver, and exhaustive bounds."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_custom.adversarial import frozen
from lightning_custom.attacks import Ball, margins, pgd, pgd_with_restarts, square_search
from lightning_custom.networks import ConvClassifier

NORMS = ("linf", "l2")
every_norm = pytest.mark.parametrize("norm", NORMS)
ORDER = {"linf": torch.inf, "l2": 2}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def distances(norm, points, inputs):
    return torch.linalg.vector_norm((points - inputs).flatten(1), ord=ORDER[norm], dim=1)


def nearest(norm, eps, point, *, inside):
    """The nearest point of the ball around ``inside``, and for L-inf of the box, as a quadratic program."""
    bounds, constraints = None, []
    if norm == "linf":
        bounds = [(max(0.0, x - eps), min(1.0, x + eps)) for x in inside]
    else:
        within = {"fun": lambda y: eps**2 - ((y - inside) ** 2).sum(), "jac": lambda y: -2 * (y - inside)}
        constraints = [{"type": "ineq", **within}]
    found = minimize(
        lambda y: ((y - point) ** 2).sum(), inside, jac=lambda y: 2 * (y - point), bounds=bounds,
        constraints=constraints, method="SLSQP", options={"ftol": 1e-11},
    )  # fmt: skip
    return found.x


@every_norm
@pytest.mark.parametrize("seed", range(4))
def test_the_projection_is_the_nearest_point_that_a_solver_finds(norm, seed):
    inputs = torch.rand(1, 5, generator=draws(seed), dtype=torch.float64)
    points = inputs + torch.randn(1, 5, generator=draws(seed + 50), dtype=torch.float64)
    # The box is open for L2: with it, the ball first and the box then is not the nearest point.
    ball = Ball(norm, 0.3) if norm == "linf" else Ball(norm, 0.3, -torch.inf, torch.inf)
    expected = nearest(norm, 0.3, points[0].numpy(), inside=inputs[0].numpy())
    assert np.allclose(ball.project(inputs, points)[0].numpy(), expected, atol=1e-5)


@every_norm
def test_a_projected_point_is_in_ball_and_box_and_one_that_was_stays(norm):
    inputs, ball = torch.rand(200, 3, 4, 4, generator=draws(), dtype=torch.float64), Ball(norm, 0.4)
    points = ball.project(inputs, inputs + 3 * torch.randn(inputs.shape, generator=draws(1), dtype=torch.float64))
    assert distances(norm, points, inputs).max() <= 0.4 + 1e-12
    assert points.min() >= 0
    assert points.max() <= 1
    torch.testing.assert_close(ball.project(inputs, points), points, rtol=0, atol=1e-12)


def test_without_the_box_the_projection_leaves_it():
    inputs, points = torch.zeros(1, 4), torch.full((1, 4), -1.0)
    assert Ball("linf", 0.4, low=-1.0).project(inputs, points).min() < 0


@every_norm
def test_starts_are_uniform_in_the_ball(norm):
    start = Ball(norm, 0.5).start((20000, 3), draws())
    lengths = torch.linalg.vector_norm(start, ord=ORDER[norm], dim=1)
    assert lengths.max() <= 0.5 + 1e-6
    # The share of a ball's volume within r is (r / eps)^d, in any norm.
    shares = (lengths / 0.5).pow(3).sort().values
    assert (shares - torch.linspace(0, 1, len(shares))).abs().max() < 0.02
    assert start.mean(0).abs().max() < 0.01


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, generator=draws(3), dtype=torch.float64))

    def forward(self, inputs):
        return inputs @ self.weight.T


def entropies(model, labels):
    return lambda points: cross_entropy(model(points), labels, reduction="none")


@every_norm
@pytest.mark.parametrize("steps", [1, 20])
def test_pgd_on_a_linear_model_reaches_the_best_perturbation_in_closed_form(norm, steps):
    model, eps = Linear(), 0.3
    inputs = torch.rand(8, 6, generator=draws(), dtype=torch.float64)
    labels = torch.arange(8) % 2
    ball = Ball(norm, eps, -torch.inf, torch.inf)
    found = pgd(entropies(model, labels), inputs, ball, steps=steps, step_size=eps if steps == 1 else 0.1)
    difference = (model.weight[1 - labels] - model.weight[labels]).detach()
    best = difference.sign() if norm == "linf" else difference / difference.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, inputs + eps * best, rtol=0, atol=1e-7)
    # By duality the margin rises by eps times the dual norm of the difference of weights.
    rise = margins(model(found), labels) - margins(model(inputs), labels)
    dual = difference.norm(p=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(rise.detach(), eps * dual, rtol=0, atol=1e-7)


def test_pgd_in_the_box_reaches_the_best_corner_of_all():
    model, ball = Linear(), Ball("linf", 0.3)
    inputs, labels = torch.rand(5, 6, generator=draws(), dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    found = margins(model(pgd(entropies(model, labels), inputs, ball, steps=20, step_size=0.1)), labels)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    every = [margins(model(ball.project(inputs, inputs + 0.3 * corner)), labels) for corner in corners]
    torch.testing.assert_close(found, torch.stack(every).amax(0), rtol=0, atol=1e-12)


@every_norm
def test_a_sample_without_gradient_stays_where_it_is(norm):
    inputs = torch.rand(3, 6, generator=draws())
    found = pgd(lambda points: 0 * points.sum(1), inputs, Ball(norm, 0.3), steps=5, step_size=0.1)
    assert torch.equal(found, inputs)


@pytest.fixture(scope="module")
def problem():
    """A network that has learned eight blurred classes, and samples of them."""
    means = torch.rand(8, 1, 8, 8, generator=draws())
    labels = torch.arange(64) % 8
    inputs = (means[labels] + 0.1 * torch.randn(64, 1, 8, 8, generator=draws(1))).clamp(0, 1)
    torch.manual_seed(0)
    model = ConvClassifier(1, 8, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.requires_grad_(False), inputs, labels


def mean_loss(problem, ball, steps):
    model, inputs, labels = problem
    losses = entropies(model, labels)
    start = ball.start((1, *inputs.shape[1:]), draws())
    step_size = 2.5 * ball.eps / max(steps, 1)
    return float(losses(pgd(losses, inputs, ball, steps=steps, step_size=step_size, start=start)).mean())


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.8)])
def test_more_steps_raise_the_mean_loss_and_downhill_steps_do_not(problem, norm, eps):
    ball = Ball(norm, eps)
    found = [mean_loss(problem, ball, steps) for steps in (0, 1, 4, 16, 32)]
    assert found == sorted(found)
    assert found[-1] > 1.5 * found[0]
    model, inputs, labels = problem
    down = pgd(lambda points: -entropies(model, labels)(points), inputs, ball, steps=16, step_size=eps / 6)
    assert entropies(model, labels)(down).mean() < entropies(model, labels)(inputs).mean()


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.8)])
def test_attacks_stay_in_ball_and_box_and_the_gradient_beats_the_search(problem, norm, eps):
    model, inputs, labels = problem
    ball = Ball(norm, eps)
    by_gradient = pgd_with_restarts(
        model, inputs, labels, ball, steps=20, step_size=eps / 8, restarts=2, generator=draws()
    )
    by_search = square_search(model, inputs, labels, ball, queries=100, generator=draws())
    for points in (by_gradient, by_search):
        assert distances(norm, points, inputs).max() <= eps + 1e-6
        assert points.min() >= 0
        assert points.max() <= 1
    right = [int(margins(model(points), labels).le(0).sum()) for points in (by_gradient, by_search, inputs)]
    assert right == sorted(right)
    assert right[0] < right[2]


def test_more_restarts_fool_no_fewer_and_what_is_wrong_already_is_left_alone(problem):
    model, inputs, labels = problem
    wrong = (labels + (torch.arange(len(labels)) < 10)) % 8  # labels that the model does not give
    ball, right = Ball("linf", 0.05), []
    for restarts in (1, 2, 4, 8):
        found = pgd_with_restarts(
            model, inputs, wrong, ball, steps=5, step_size=0.02, restarts=restarts, generator=draws()
        )
        right.append(int(margins(model(found), wrong).le(0).sum()))
        is_wrong = margins(model(inputs), wrong) > 0
        assert torch.equal(found[is_wrong], inputs[is_wrong])
    assert right == sorted(right, reverse=True)


def test_more_queries_never_lower_a_margin(problem):
    model, inputs, labels = problem
    found = [
        margins(model(square_search(model, inputs, labels, Ball("linf", 0.1), queries=n, generator=draws())), labels)
        for n in (0, 10)
    ]
    assert (found[1] >= found[0] - 1e-5).all()
    assert (found[1] > found[0]).float().mean() > 0.5


class Masked(nn.Module):
    """The same decisions without a gradient: inputs are rounded first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model((inputs * 64).round() / 64)


def test_the_search_finds_what_a_masked_gradient_hides(problem):
    model, inputs, labels = problem
    masked, ball = Masked(model), Ball("linf", 0.15)

    def losses(points):  # the gradient of rounding is zero
        return entropies(masked, labels)(points)

    hidden = pgd(losses, inputs, ball, steps=20, step_size=0.03)
    searched = square_search(masked, inputs, labels, ball, queries=200, generator=draws())
    right = [int(margins(masked(points), labels).le(0).sum()) for points in (hidden, searched)]
    assert right[1] < right[0] - 8


@every_norm
def test_a_sample_is_attacked_alike_in_any_batch(problem, norm):
    model, inputs, labels = problem
    model, inputs, ball = model.double(), inputs.double(), Ball(norm, 0.1)

    def both(part):
        arguments = (model, inputs[part], labels[part], ball)
        by_gradient = pgd_with_restarts(*arguments, steps=4, step_size=0.03, restarts=2, generator=draws())
        return by_gradient, square_search(*arguments, queries=10, generator=draws())

    whole, parts = both(slice(None)), [both(slice(0, 30)), both(slice(30, None))]
    for number, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), expected, rtol=0, atol=1e-9)
    model.float()


def test_the_parameters_get_no_gradient_and_are_as_they_were():
    model = ConvClassifier(1, 8, 3, 8)
    inputs, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    with frozen(model):
        perturbed = pgd(entropies(model, labels), inputs, Ball("linf", 0.1), steps=2, step_size=0.1)
    assert not perturbed.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_margins_are_those_of_the_best_wrong_class():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert margins(logits, torch.tensor([0, 2])).tolist() == [-1.0, 1.0]
    assert math.isinf(float(margins(torch.ones(1, 1), torch.tensor([0]))))
