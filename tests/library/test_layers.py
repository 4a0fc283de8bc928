"""Parts of a network by the names of their parameters."""

import pytest
from torch import nn

from lightning_custom.errors import ConfigError
from lightning_custom.layers import freeze_, head_of
from lightning_custom.networks import FewShotConvNet, sinusoid_network


class HeadFirst(nn.Module):
    """Its head is made before its trunk."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.trunk = nn.Sequential(nn.Linear(4, 3))


class Headless(nn.Module):
    """A trunk as torchvision's and timm's users cut it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Identity()
        self.trunk = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "make, head",
    [
        (Headless, "trunk.1."),
        (lambda: nn.Linear(4, 3), ""),
        (sinusoid_network, "4."),
        (lambda: FewShotConvNet(5, width=8), "head."),
        (HeadFirst, "head."),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 1)), nn.Softplus()), "1.1."),
    ],
)
def test_the_head_is_the_layer_of_that_name_or_the_last_with_parameters(make, head):
    network = make()
    assert head_of(network) == head
    assert [name.removeprefix(head) for name, _ in network.named_parameters() if name.startswith(head)] == [
        "weight", "bias"
    ]  # fmt: skip


def test_frozen_parameters_are_those_whose_names_begin_so():
    network = FewShotConvNet(5, width=8)
    freeze_(network, ("trunk.0.", "head.bias"))
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert fixed == {"trunk.0.weight", "head.bias"}


def test_freezing_nothing_changes_nothing():
    network = sinusoid_network()
    freeze_(network, ())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_beginning_that_no_name_has_is_refused():
    with pytest.raises(ConfigError, match=r"^frozen: no parameter's name begins with 'trunk'; see model.named_par"):
        freeze_(sinusoid_network(), ("0.", "trunk"))
