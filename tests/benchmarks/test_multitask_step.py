import pytest
import torch

from tests.benchmarks.multitask_step import LIBMTL, METHODS, OURS, TRUNKS, Problem, forward_of, ours, plain, updates

SMALL = 6


def direction(built):
    trunk, update = built
    update()
    return torch.cat([parameter.grad.flatten() for parameter in trunk.parameters()])


def cosine(one, other):
    return float(one @ other / one.norm() / other.norm())


def everybody(problem, method):
    return {name: direction(built) for name, built in updates(problem, method).items()}


# TorchJD's MGDA stops early, and its Nash-MTL and CAGrad smooth their problems: no closer than that to the exact point.
CLOSE = {"mgda": 1e-3, "nash-mtl": 1e-3, "cagrad": 1e-3}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "graddrop"])
@pytest.mark.filterwarnings("ignore")
def test_everybody_moves_the_same_way(method):
    found = everybody(Problem("LeNet", 2, SMALL), method)
    equal = direction(plain(Problem("LeNet", 2, SMALL)))
    for name, other in found.items():
        assert cosine(found[OURS], other) >= 1 - CLOSE.get(method, 1e-5), name
        if method == "mgda":  # a direction of its own, so that the equality says something
            assert cosine(other, equal) < 1


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.filterwarnings("ignore")
def test_everybody_moves_the_same_way_with_a_batch_a_task(trunk):
    found = everybody(Problem(trunk, 2, SMALL, apart=True), "pcgrad")
    for name, other in found.items():
        assert cosine(found[OURS], other) >= 1 - 1e-5, name


@pytest.mark.filterwarnings("ignore")
def test_everybody_s_graddrop_keeps_the_gradients_of_one_sign():
    problem = Problem("LeNet", 2, SMALL)
    trunk, heads = problem.networks()
    losses, _ = forward_of(problem, trunk, heads)()
    rows = torch.stack([
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True)])
        for loss in losses
    ])  # fmt: skip
    positive, negative = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
    for found in everybody(problem, "graddrop").values():
        # Drawn from two: off by rounding alone from one of them.
        off = torch.minimum((found - positive).abs(), (found - negative).abs())
        assert off.max() <= 1e-6 * rows.abs().max()


def test_equal_weighting_is_the_plain_loop():
    problem = Problem("ResNet", 2, SMALL)
    assert cosine(direction(ours(problem, "equal")), direction(plain(problem))) >= 1 - 1e-6


def test_batched_and_sequential_passes_move_the_same_way():
    problem = Problem("ResNet", 3, SMALL)
    one, other = (direction(ours(problem, "upgrad", batched_backward=batched)) for batched in (False, True))
    assert cosine(one, other) >= 1 - 1e-6


def test_libmtl_is_compared_by_methods_that_there_are():
    assert LIBMTL.keys() <= set(METHODS)
