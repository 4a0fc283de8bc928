"""FSDP on two processes: what is gathered is what an unsharded model and optimizer would store, and back again."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from lightning_custom.sharded import (
    _shard,
    cut_optimizer_,
    gather_module,
    gather_optimizer,
    is_sharded,
    load_weights_,
    local_part,
    owner,
    whole,
)
from lightning_custom.testing import first_difference, in_processes, largest_difference

pytestmark = pytest.mark.distributed


class Normalised(nn.Module):
    """With a buffer, a parameter of its own, and sizes that two processes cannot halve."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None), nn.ReLU())
        self.outer = nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return self.outer(self.inner(inputs * self.scale))


def model_and_optimizer(seed):
    torch.manual_seed(seed)
    model = Normalised()
    return model, lambda: torch.optim.AdamW(
        # In another order than the model's own.
        [{"params": model.outer.parameters(), "lr": 0.1}, {"params": [model.scale, *model.inner.parameters()]}],
        lr=0.01,
    )


def sharded_model_and_optimizer(seed):
    model, optimizer = model_and_optimizer(seed)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    return _shard(model, mesh), optimizer()


def train(model, optimizer, steps=3):
    # Every process has the whole batch, so that the average of gradients is the gradient.
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        inputs, targets = torch.randn(6, 3, generator=generator), torch.randn(6, 1, generator=generator)
        optimizer.zero_grad()
        mse_loss(model(inputs), targets).backward()
        optimizer.step()


def gathered(model, optimizer):
    return {"module": gather_module(model), "optimizer": gather_optimizer(model, optimizer)}


def compare(fabric):
    plain, make = model_and_optimizer(0)
    plain_optimizer = make()
    sharded, optimizer = sharded_model_and_optimizer(0)
    for pair in ((plain, plain_optimizer), (sharded, optimizer)):
        train(*pair)
    stored = copy.deepcopy({"module": dict(plain.state_dict()), "optimizer": plain_optimizer.state_dict()})

    # Into a model and an optimizer that have seen nothing, and out again.
    other, other_optimizer = sharded_model_and_optimizer(1)
    given = copy.deepcopy(stored)
    load_weights_(other, given["module"])
    cut_optimizer_(other, other_optimizer, given["optimizer"])
    loaded = copy.deepcopy(gathered(other, other_optimizer))
    train(other, other_optimizer, steps=2)
    train(plain, plain_optimizer, steps=2)

    return {
        "stored": stored,
        "gathered": gathered(sharded, optimizer),
        "loaded": loaded,
        "trained on": gathered(other, other_optimizer),
        "trained on unsharded": {"module": dict(plain.state_dict()), "optimizer": plain_optimizer.state_dict()},
        "whole": {name: whole(parameter.detach()) for name, parameter in sharded.named_parameters()},
        "held": sum(local_part(parameter.detach()).numel() for parameter in sharded.parameters()),
        "all": sum(parameter.numel() for parameter in plain.parameters()),
        "kinds": [isinstance(parameter, DTensor) for parameter in sharded.parameters()],
        "is sharded": [is_sharded(sharded), is_sharded(plain)],
        "owners": [owner([plain, sharded], optimizer) is sharded, owner([plain, sharded], plain_optimizer) is None],
    }


@pytest.fixture(scope="module")
def found():
    return in_processes(compare, 2)


def test_gathered_state_is_that_of_an_unsharded_run(found):
    first, second = found
    assert first["gathered"]["optimizer"]["param_groups"] == first["stored"]["optimizer"]["param_groups"]
    assert largest_difference(first["stored"]["module"], first["gathered"]["module"]) <= 1e-6
    assert largest_difference(first["stored"]["optimizer"]["state"], first["gathered"]["optimizer"]["state"]) <= 1e-6
    assert second["gathered"] == {"module": {}, "optimizer": {}}


def test_a_loaded_state_comes_back_to_the_bit(found):
    assert first_difference(found[0]["stored"], found[0]["loaded"]) is None


def test_training_goes_on_from_a_loaded_state_as_unsharded(found):
    first = found[0]
    assert largest_difference(first["stored"]["module"], first["trained on"]["module"]) > 1e-3
    for part in ("module", "optimizer"):
        expected, actual = first["trained on unsharded"][part], first["trained on"][part]
        assert largest_difference(expected.get("state", expected), actual.get("state", actual)) <= 1e-6


def test_each_process_holds_a_part_and_all_together_the_whole(found):
    assert all(all(part["kinds"]) for part in found)
    weights = {name: found[0]["gathered"]["module"][name] for name in found[0]["whole"]}
    assert all(first_difference(weights, part["whole"]) is None for part in found)
    assert sum(part["held"] for part in found) == found[0]["all"]
    assert all(part["held"] < part["all"] for part in found)


def test_what_is_sharded_and_whose_an_optimizer_is(found):
    assert all(part["is sharded"] == [True, False] and part["owners"] == [True, True] for part in found)
