"""Gradients and Hessian products of tasks against torch's own, one task at a time."""

import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn

from lightning_custom.few_shot import as_leaves, own_copies, trainable
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.task_curvature import as_parts, as_vectors, gradient_vectors, hessian_product

TASKS = 3


def network_of_tasks():
    torch.manual_seed(0)
    return TaskModel(Bare(Scaled().double(), Precision()), together=True)


class Scaled(nn.Module):
    """With a parameter that is a scalar."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, inputs):
        return self.scale * self.layers(inputs)


def losses_of(model, inputs, targets):
    """``parameters -> losses [T]``."""
    return lambda parameters: per_task(None)(model(inputs, parameters), targets)


def setup():
    model, draw = network_of_tasks(), torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(TASKS, 5, size, generator=draw, dtype=torch.float64) for size in (2, 1))
    copies = own_copies(trainable(model.module), TASKS)
    leaves = as_leaves({name: part + torch.randn(part.shape, generator=draw) / 5 for name, part in copies.items()})
    return losses_of(model, inputs, targets), leaves


def test_gradients_and_products_are_those_of_the_whole_matrices():
    losses, leaves = setup()
    parts = list(leaves.values())
    vectors = as_vectors(parts).detach()

    def total(flat):
        return losses(dict(zip(leaves, as_parts(flat, parts), strict=True))).sum()

    hessian = torch.autograd.functional.hessian(total, vectors)  # [T, P, T, P]
    gradient, product = hessian_product(losses(leaves), leaves)
    expected = torch.autograd.functional.jacobian(total, vectors)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(gradient_vectors(losses(leaves), leaves), expected)
    direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2):  # the graph is still there the second time
        torch.testing.assert_close(product(direction), torch.einsum("tpsq,sq->tp", hessian, direction))


def test_parts_of_vectors_are_the_parts():
    _, leaves = setup()
    parts = list(leaves.values())
    for part, again in zip(parts, as_parts(as_vectors(parts), parts), strict=True):
        assert torch.equal(part, again)
    halves = [part.to(torch.bfloat16) for part in parts]
    assert as_vectors(halves).dtype is torch.float32
    assert {part.dtype for part in as_parts(as_vectors(halves), halves)} == {torch.bfloat16}


def test_a_loss_without_curvature_has_products_of_zero():
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    unused = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)
    gradient, product = hessian_product(2 * weights.sum(1), {"weights": weights, "unused": unused})
    assert gradient.tolist() == [[2.0, 2.0, 2.0, 0.0]] * 2
    assert torch.equal(product(torch.ones(2, 4, dtype=torch.float64)), torch.zeros(2, 4, dtype=torch.float64))
