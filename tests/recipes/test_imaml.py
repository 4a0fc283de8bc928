"""The implicit gradient against closed forms and finite differences; what the inner loop keeps."""

from functools import partial

import pytest
import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn
from torch.nn.functional import mse_loss

from lightning_custom.errors import ConfigError
from lightning_custom.few_shot import as_leaves, last
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from recipes import imaml, maml

TASKS, SUPPORT, QUERY, SIZE, LAMBDA = 3, 6, 5, 4, 0.7
PLAIN = {"inner_lr": 0.1, "proximal": LAMBDA, "cg_damping": 0.0}


def linear():
    return nn.Linear(SIZE, 1)


def network():
    return nn.Sequential(nn.Linear(SIZE, 5), nn.Tanh(), nn.Linear(5, 1))


class Problem:
    def __init__(self, make, *, batching="vmap", **fields):
        torch.manual_seed(0)
        module = make().double()
        self.config = imaml.IMAMLConfig(**{**PLAIN, **fields})
        self.model = TaskModel(Bare(module, Precision()), together=batching == "vmap")
        self.initial = list(module.parameters())
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.tasks = [draw(TASKS, n, size) for n in (SUPPORT, QUERY) for size in (SIZE, 1)]
        self.losses = per_task(None)

    def adapted(self):
        steps = self.config.inner_steps
        return last(imaml.inner_loop(self.model, self.config, self.losses, *self.tasks[:2], steps=steps))

    def gradient(self):
        found, sums = imaml.implicit_gradient(self.model, self.config, self.losses, self.adapted(), *self.tasks)
        return torch.cat([part.flatten() for part in found.values()]), sums

    def loss(self):
        """The query loss, summed over tasks, where the inner loop ends."""
        return float(self.losses(self.model(self.tasks[2], self.adapted()), self.tasks[3]).sum())


def with_ones(inputs):
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def ridge(problem):
    """Closed form for the linear model: each task's minimum ``[T, P]``, and the outer gradient ``[P]``."""
    weight, bias = problem.initial
    start = torch.cat([weight.detach().flatten(), bias.detach()])
    minima, total = [], 0
    for support, targets, query, query_targets in zip(*problem.tasks, strict=True):
        a, b = with_ones(support), with_ones(query)
        hessian = 2 / SUPPORT * a.T @ a
        pulled = hessian + LAMBDA * torch.eye(len(start), dtype=torch.float64)
        minimum = torch.linalg.solve(pulled, 2 / SUPPORT * a.T @ targets.squeeze(1) + LAMBDA * start)
        slope = 2 / QUERY * b.T @ (b @ minimum - query_targets.squeeze(1))
        # The minimum moves by lambda (H + lambda)^-1 with the initial parameters.
        total = total + LAMBDA * torch.linalg.solve(pulled, slope)
        minima.append(minimum)
    return torch.stack(minima), total


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_gradient_of_a_quadratic_problem_is_that_in_closed_form(batching):
    problem = Problem(linear, batching=batching, inner_steps=400, cg_steps=SIZE + 1)
    minima, expected = ridge(problem)
    adapted = problem.adapted()
    torch.testing.assert_close(of_linear(adapted), minima, rtol=1e-10, atol=1e-10)
    gradient, sums = problem.gradient()
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)
    assert float(sums["cg/residual"]) < 1e-8
    assert float(sums["inner/gradient_norm"]) < 1e-8


def of_linear(adapted):
    return torch.cat([adapted["weight"].flatten(1), adapted["bias"]], 1)


def test_at_a_rate_at_which_gradient_descent_diverges_the_minimum_is_still_reached():
    problem = Problem(linear, inner_lr=40.0, inner_steps=600)
    torch.testing.assert_close(of_linear(problem.adapted()), ridge(problem)[0], rtol=1e-8, atol=1e-8)


def test_no_step_raises_a_tasks_loss_and_pull():
    problem = Problem(network, inner_lr=3.0)
    start, before = [part.detach() for part in problem.initial], None
    steps = imaml.inner_loop(problem.model, problem.config, problem.losses, *problem.tasks[:2], steps=12)
    moves = 0
    for adapted in steps:
        pull = sum(
            (part - begin).flatten(1).square().sum(1) for part, begin in zip(adapted.values(), start, strict=True)
        )
        value = problem.losses(problem.model(problem.tasks[0], adapted), problem.tasks[1]) + LAMBDA / 2 * pull
        if before is not None:
            assert (value <= before + 1e-12).all()
            moves += int((value < before).sum())
        before = value
    assert 0 < moves < 12 * TASKS


@pytest.mark.parametrize("fields", [{"inner_steps": 2}, {"cg_steps": 1}, {"cg_damping": 1.0}])
def test_with_too_few_steps_or_damping_the_gradient_is_another_one(fields):
    problem = Problem(linear, **{"inner_steps": 400, "cg_steps": SIZE + 1, **fields})
    _, expected = ridge(problem)
    assert (problem.gradient()[0] - expected).norm() > 1e-2 * expected.norm()


def test_gradient_of_a_network_is_that_of_finite_differences_of_its_inner_minimum():
    problem = Problem(network, inner_steps=500, inner_lr=0.15, proximal=4.0, cg_steps=40)
    gradient, sums = problem.gradient()
    assert float(sums["inner/gradient_norm"]) < 1e-12
    draw, width = torch.Generator().manual_seed(2), 1e-4
    for _ in range(2):
        directions = [torch.randn(part.shape, generator=draw, dtype=torch.float64) for part in problem.initial]
        values = []
        for move in (width, -2 * width):
            with torch.no_grad():
                for part, direction in zip(problem.initial, directions, strict=True):
                    part.add_(direction, alpha=move)
            values.append(problem.loss())
        with torch.no_grad():
            for part, direction in zip(problem.initial, directions, strict=True):
                part.add_(direction, alpha=width)
        expected = (values[0] - values[1]) / (2 * width)
        found = float(gradient @ torch.cat([part.flatten() for part in directions]))
        assert found == pytest.approx(expected, rel=1e-6)


def test_inner_loop_is_gradient_descent_on_the_loss_and_the_pull_written_out():
    problem = Problem(network, inner_steps=3)
    adapted = problem.adapted()
    for task in range(TASKS):
        start = [part.detach() for part in problem.initial]
        parts = [part.clone().requires_grad_() for part in start]
        names = dict(problem.model.module.named_parameters())
        for _ in range(3):
            outputs = torch.func.functional_call(
                problem.model.module, dict(zip(names, parts, strict=True)), (problem.tasks[0][task],)
            )
            pull = sum(((part - begin) ** 2).sum() for part, begin in zip(parts, start, strict=True))
            found = torch.autograd.grad(mse_loss(outputs, problem.tasks[1][task]) + LAMBDA / 2 * pull, parts)
            parts = [(part - 0.1 * slope).detach().requires_grad_() for part, slope in zip(parts, found, strict=True)]
        for name, part in zip(names, parts, strict=True):
            torch.testing.assert_close(adapted[name][task], part.detach(), rtol=1e-10, atol=1e-12)


def test_without_a_solve_the_gradient_is_that_of_the_query_loss_where_the_inner_loop_ends():
    problem = Problem(network, inner_steps=3, cg_steps=0)
    leaves = as_leaves(problem.adapted())
    total = problem.losses(problem.model(problem.tasks[2], leaves), problem.tasks[3]).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    expected = torch.cat([part.sum(0).flatten() for part in found])
    torch.testing.assert_close(problem.gradient()[0], expected, rtol=1e-12, atol=1e-14)


class Saved:
    """Counts the tensors that autograd keeps at one time."""

    def __init__(self):
        self.now = self.most = 0

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(self, tensor), lambda kept: kept.tensor)


class Kept:
    def __init__(self, count, tensor):
        self.count, self.tensor = count, tensor
        count.now += 1
        count.most = max(count.most, count.now)

    def __del__(self):
        self.count.now -= 1


def most_saved(run):
    saved = Saved()
    with saved.hooks():
        run()
    return saved.most


def test_what_autograd_keeps_does_not_grow_with_the_inner_steps():
    few, many = (most_saved(Problem(network, inner_steps=steps).gradient) for steps in (1, 20))
    assert few == many > 0


def test_what_autograd_keeps_grows_with_the_inner_steps_of_maml():
    def outer_gradient(steps):
        problem, config = Problem(network), maml.MAMLConfig(inner_steps=steps)
        initial = dict(problem.model.module.named_parameters())
        total, _ = maml.query_loss(problem.model, config, problem.losses, initial, {}, *problem.tasks)
        torch.autograd.grad(total, list(initial.values()))

    few, many = (most_saved(partial(outer_gradient, steps)) for steps in (1, 20))
    assert many > 5 * few


def test_an_adapted_copy_is_where_the_inner_loop_ends():
    problem = Problem(network, test_steps=3, inner_steps=3)
    module, config = problem.model.module, problem.config
    copied = imaml.adapt(module, (problem.tasks[0][1], problem.tasks[1][1]), config=config)
    before = [part.clone() for part in problem.initial]
    for name, part in copied.named_parameters():
        torch.testing.assert_close(part, problem.adapted()[name][1], rtol=1e-12, atol=1e-14)
    assert all(torch.equal(part, same) for part, same in zip(problem.initial, before, strict=True))


def test_a_pull_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"proximal: 0\.0; give a number above 0"):
        imaml.IMAMLConfig(proximal=0.0)
