"""Small networks in NumPy give what torch gives, and know what they cannot do."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_custom.numpy_network import acting_network, numpy_forward
from lightning_custom.policies import GaussianPolicy, mlp
from lightning_custom.testing import single_process

NETWORKS = {
    "mlp": lambda: mlp(6, 3, gain=1.0),
    "relu": lambda: mlp(6, 3, gain=1.0, activation=nn.ReLU, layers=3, width=9),
    "gaussian": lambda: GaussianPolicy(mlp(6, 2, gain=1.0), 2, log_std=-0.3),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh()), nn.Identity()),
    "one layer": lambda: nn.Linear(6, 2),
}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_torch(name, dtype, bound):
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    inputs = torch.randn(7, 6, dtype=dtype)
    found = numpy_forward(network)(inputs.numpy())
    assert found.dtype == (np.float32 if dtype is torch.float32 else np.float64)
    np.testing.assert_allclose(found, network(inputs).detach().numpy(), rtol=bound, atol=bound)


def test_observations_of_another_precision_are_taken_in_that_of_the_network():
    network = mlp(6, 3, gain=1.0).double()
    inputs = torch.randn(5, 6)
    found = numpy_forward(network)(inputs.numpy())
    np.testing.assert_allclose(found, network(inputs.double()).detach().numpy(), rtol=1e-12)


def test_an_update_in_place_is_seen_at_once():
    network = mlp(6, 3, gain=1.0)
    forward, inputs = numpy_forward(network), torch.randn(5, 6)
    before = forward(inputs.numpy())
    optimizer = torch.optim.Adam(network.parameters(), 0.1, fused=True)
    network(inputs).sum().backward()
    optimizer.step()
    after = forward(inputs.numpy())
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, network(inputs).detach().numpy(), rtol=2e-6, atol=2e-6)


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def with_hook():
    network = nn.Sequential(nn.Linear(6, 2))
    network[0].register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(1, 1, 1)),
        nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)),
        nn.Sequential(Doubled(6, 2)),
        with_hook(),
        mlp(6, 3, gain=1.0).bfloat16(),
        nn.Linear(6, 5000),
        nn.Identity(),
    ],
    ids=["convolution", "dropout", "subclass", "hook", "bfloat16", "large", "no parameters"],
)
def test_a_network_that_numpy_is_not_right_or_fast_for_is_left_to_torch(network):
    assert numpy_forward(network) is None


def test_acting_in_torch_takes_dicts_and_leaves_no_gradient():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, observations):
            return self.weight * (observations["a"] + observations["b"])

    network = Sum()
    act = acting_network(single_process(), network)
    found = act({"a": np.ones((3, 1), np.float32), "b": np.arange(3, dtype=np.float32)[:, None]})
    assert found.ravel().tolist() == [2.0, 4.0, 6.0]
    assert network.weight.grad is None
