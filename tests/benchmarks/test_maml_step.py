import pytest
import torch

from tests.benchmarks.maml_step import NAIVE, OURS, images, naive, ours, sinusoids, updates


def gradient_of(network, update):
    update()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("problem", [sinusoids(3), images(2)], ids=["sinusoids", "images"])
@pytest.mark.filterwarnings("ignore")
def test_everybody_computes_the_same_outer_gradient(problem, first_order):
    found = {name: gradient_of(*pair) for name, pair in updates(problem, 2, first_order=first_order).items()}
    assert {OURS, NAIVE} <= found.keys()
    for gradient in found.values():
        assert (gradient - found[NAIVE]).norm() <= 1e-4 * found[NAIVE].norm()


def test_the_updates_move_the_parameters_alike():
    networks = []
    for make in (ours, naive):
        torch.manual_seed(0)
        problem = sinusoids(3)
        networks.append(problem.network())
        start = [parameter.detach().clone() for parameter in networks[-1].parameters()]
        make(problem, networks[-1], 1, first_order=False)()
    for one, other, before in zip(*(network.parameters() for network in networks), start, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert not torch.equal(one, before)
