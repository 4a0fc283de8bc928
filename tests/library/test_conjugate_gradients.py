"""Conjugate gradients against a direct solve, in float64."""

from itertools import pairwise

import pytest
import torch

from lightning_custom.conjugate_gradients import conjugate_gradients

SYSTEMS, UNKNOWNS = 3, 7


@pytest.fixture
def systems():
    """Symmetric positive definite matrices ``[T, P, P]`` and right sides ``[T, P]``."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(SYSTEMS, UNKNOWNS, UNKNOWNS, generator=draw, dtype=torch.float64)
    matrices = root @ root.mT + 0.5 * torch.eye(UNKNOWNS, dtype=torch.float64)
    return matrices, torch.randn(SYSTEMS, UNKNOWNS, generator=draw, dtype=torch.float64)


def times(matrices):
    return lambda vectors: (matrices @ vectors.unsqueeze(2)).squeeze(2)


def distance(matrices, right, **how):
    """From the solution, in the norm that conjugate gradients lower, and what is reported as left."""
    found, left = conjugate_gradients(times(matrices), right, **how)
    error = found - torch.linalg.solve(matrices, right)
    return (error * times(matrices)(error)).sum(1), left, found


@pytest.mark.parametrize("with_start", [False, True])
def test_as_many_steps_as_unknowns_give_the_direct_solution(systems, with_start):
    matrices, right = systems
    found, left = conjugate_gradients(times(matrices), right, right if with_start else None, steps=UNKNOWNS)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right), rtol=1e-8, atol=1e-8)
    assert left.max() < 1e-7


def test_each_step_lowers_the_error_and_what_is_left_is_the_residual(systems):
    matrices, right = systems
    errors = []
    for steps in range(UNKNOWNS):
        error, left, found = distance(matrices, right, steps=steps)
        errors.append(error)
        torch.testing.assert_close(left, (right - times(matrices)(found)).norm(dim=1), rtol=1e-8, atol=1e-10)
    assert all((after < before).all() for before, after in pairwise(errors))


def test_as_many_steps_as_different_eigenvalues_are_enough(systems):
    _, right = systems
    basis = torch.linalg.qr(torch.randn(UNKNOWNS, UNKNOWNS, generator=torch.Generator().manual_seed(1)).double())[0]
    values = torch.tensor([1.0, 1, 1, 5, 5, 5, 5], dtype=torch.float64)
    matrices = (basis * values @ basis.T).expand(SYSTEMS, -1, -1)
    assert distance(matrices, right, steps=1)[0].min() > 1e-4
    assert distance(matrices, right, steps=2)[0].max() < 1e-15


def test_systems_do_not_see_each_other(systems):
    matrices, right = systems
    together, _ = conjugate_gradients(times(matrices), right, steps=3)
    for system in range(SYSTEMS):
        alone, _ = conjugate_gradients(times(matrices[system : system + 1]), right[system : system + 1], steps=3)
        torch.testing.assert_close(together[system], alone[0], rtol=1e-12, atol=1e-14)


def test_no_steps_give_the_start(systems):
    matrices, right = systems
    found, left = conjugate_gradients(times(matrices), right, right, steps=0)
    assert torch.equal(found, right)
    torch.testing.assert_close(left, (right - times(matrices)(right)).norm(dim=1))
    assert torch.equal(conjugate_gradients(times(matrices), right, steps=0)[0], torch.zeros_like(right))


def test_a_solved_system_and_one_that_is_not_positive_stay_where_they_are(systems):
    matrices, right = systems
    matrices = torch.stack([matrices[0], -matrices[1], matrices[2]])
    right = torch.stack([right[0], right[1], torch.zeros_like(right[2])])
    found, _ = conjugate_gradients(times(matrices), right, steps=UNKNOWNS)
    torch.testing.assert_close(found[0], torch.linalg.solve(matrices[0], right[0]), rtol=1e-8, atol=1e-8)
    assert torch.equal(found[1:], torch.zeros_like(found[1:]))
