import pytest
import torch
from torch import nn

from lightning_custom.target_network import TargetNetwork


def values(module):
    return torch.cat([part.detach().flatten().float() for part in module.parameters()])


def test_it_begins_as_a_copy_and_lags_behind():
    network = nn.Linear(3, 2)
    target, first = TargetNetwork(network), values(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(values(target.module), first)
    for _ in range(2):
        target.update_(0.1)
    torch.testing.assert_close(values(target.module), first + 1 - 0.9**2)
    target.update_(1)
    assert torch.equal(values(target.module), values(network))
    assert not any(parameter.requires_grad for parameter in target.module.parameters())


def test_small_moves_of_a_network_in_half_precision_are_not_lost():
    network = nn.Linear(3, 2).bfloat16()
    target = TargetNetwork(network)
    first = values(target.module)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1)
    for _ in range(100):
        target.update_(1e-3)
    torch.testing.assert_close(values(target.module), 1 + (first - 1) * 0.999**100)


def test_buffers_are_copied():
    network = nn.BatchNorm1d(2)
    target = TargetNetwork(network)
    network(torch.randn(4, 2))
    target.update_(0.5)
    assert torch.equal(target.module.running_mean, network.running_mean)


@pytest.mark.parametrize("share", [0.3, 1])
def test_its_state_is_restored(share):
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    target, restored = TargetNetwork(network), TargetNetwork(other)
    restored.load_state_dict(target.state_dict())
    other.load_state_dict(network.state_dict())
    for one in (target, restored):
        one.update_(share)
    assert torch.equal(values(target.module), values(restored.module))
