"""One vector does what Adam does on every parameter, whoever writes to the parameters, and stores what Adam stores."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam

from lightning_custom.errors import ConfigError
from lightning_custom.flat_adam import FlatAdam, flattened
from lightning_custom.gradients import clip_norm_
from lightning_custom.testing import first_difference, largest_difference, single_process

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(module, optimizer, numbers, max_norm=0.0):
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        inputs, targets = (torch.randn(6, width, generator=draw, dtype=torch.float64) for width in (3, 2))
        dtype = next(module.parameters()).dtype
        optimizer.zero_grad()
        mse_loss(module(inputs.to(dtype)), targets.to(dtype)).backward()
        if max_norm:
            clip_norm_([optimizer.vector] if isinstance(optimizer, FlatAdam) else module.parameters(), max_norm)
        optimizer.step()


def states(module, optimizer):
    return {"module": module.state_dict(), "optimizer": optimizer.state_dict()["state"]}


def flat(module):
    return flattened(FlatAdam(module.parameters(), **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_updates_are_adams_to_the_bit(dtype):
    one, other = network(dtype), network(dtype)
    optimizers = Adam(one.parameters(), fused=True, **OPTIONS), flat(other)
    for module, optimizer in zip((one, other), optimizers, strict=True):
        train(module, optimizer, range(5))
    assert first_difference(*(states(*pair) for pair in zip((one, other), optimizers, strict=True))) is None
    assert largest_difference(network(dtype).state_dict(), one.state_dict()) > 0.01


def test_a_clipped_update_is_adams_to_rounding_and_the_clip_is_felt():
    found = []
    for make, max_norm in ((lambda module: Adam(module.parameters(), **OPTIONS), 0.05), (flat, 0.05), (flat, 0.0)):
        module = network()
        optimizer = make(module)
        train(module, optimizer, range(3), max_norm)
        found.append(states(module, optimizer))
    assert largest_difference(*found[:2]) < 1e-14
    assert largest_difference(found[0]["optimizer"], found[2]["optimizer"]) > 1e-3


def test_it_is_adam_until_it_is_flattened():
    one, other = network(), network()
    optimizer = FlatAdam(other.parameters(), **OPTIONS)
    train(one, Adam(one.parameters(), fused=True, **OPTIONS), range(2))
    train(other, optimizer, range(2))
    assert first_difference(one.state_dict(), other.state_dict()) is None
    with pytest.raises(AttributeError, match="there is none before flatten_"):
        optimizer.vector  # noqa: B018


@pytest.mark.parametrize("kinds", [(Adam, FlatAdam, Adam), (FlatAdam, Adam, FlatAdam)])
def test_each_goes_on_from_the_others_checkpoint(kinds):
    straight = network()
    train(straight, Adam(straight.parameters(), fused=True, **OPTIONS), range(6))
    saved = None
    for part, kind in enumerate(kinds):
        module = network()
        optimizer = flat(module) if kind is FlatAdam else Adam(module.parameters(), fused=True, **OPTIONS)
        if saved is not None:
            module.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(module, optimizer, (2 * part, 2 * part + 1))
        saved = deepcopy((module.state_dict(), optimizer.state_dict()))
    assert first_difference(straight.state_dict(), module.state_dict()) is None


def test_whatever_writes_to_a_parameter_or_its_gradient_writes_to_the_vector():
    module = network()
    optimizer = flat(module)
    module[2].bias.data.fill_(7.0)
    assert optimizer.vector[-2:].tolist() == [7.0, 7.0]
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert optimizer.vector.grad[-2:].tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    assert all(not part.grad.any() for part in module.parameters())
    assert [view.shape for view in optimizer.views(optimizer.vector)] == [part.shape for part in module.parameters()]


def test_gradients_and_averages_from_before_are_kept_and_a_closure_is_called():
    one, other = network(), network()
    optimizers = Adam(one.parameters(), fused=True, **OPTIONS), FlatAdam(other.parameters(), **OPTIONS)
    inputs = torch.ones(1, 3, dtype=torch.float64)
    for module, optimizer in zip((one, other), optimizers, strict=True):
        train(module, optimizer, range(2))
        optimizer.zero_grad()
        module(inputs).sum().backward()
    optimizers[1].flatten_()
    found = [optimizer.step(lambda m=m: m(inputs).sum().backward() or 3) for m, optimizer in
             zip((one, other), optimizers, strict=True)]  # fmt: skip
    assert found == [3, 3]
    assert first_difference(one.state_dict(), other.state_dict()) is None


def test_frozen_parameters_stay():
    module = network()
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    train(module, flat(module), range(2))
    assert torch.equal(module[0].weight, before)
    assert not torch.equal(module[2].weight, network()[2].weight)


def test_behind_fabrics_wrapper_it_is_found_and_another_optimizer_is_refused():
    module = network(torch.float32)
    wrapped, optimizer = single_process().setup(module, FlatAdam(module.parameters(), **OPTIONS))
    inner = flattened(optimizer)
    optimizer.zero_grad()
    wrapped(torch.ones(2, 3)).sum().backward()
    assert inner.vector.grad[-2:].tolist() == [2.0, 2.0]
    with pytest.raises(ConfigError, match="optimizer: SGD cannot be flattened; give a FlatAdam"):
        flattened(SGD(module.parameters(), 0.1))


def test_what_one_vector_cannot_hold_is_refused():
    module = network()
    module[2].float()
    with pytest.raises(
        ConfigError, match=r"here are 1 groups of \['torch.float32', 'torch.float64'\]; make them alike"
    ):
        flat(module)
    groups = FlatAdam([{"params": [part]} for part in network().parameters()])
    with pytest.raises(ConfigError, match=r"here are 4 groups of \['torch.float64'\]"):
        flattened(groups)


def test_parameters_that_have_been_updated_differently_often_are_refused():
    module = network()
    optimizer = FlatAdam(module.parameters(), **OPTIONS)
    train(module, optimizer, range(1))
    optimizer.state[module[0].weight]["step"] += 1
    with pytest.raises(ConfigError, match=r"parameters have had \[1.0, 2.0\] updates"):
        train(module, flattened(optimizer), range(1))


def test_a_gradient_that_is_not_in_the_vector_is_no_silent_nothing():
    module, other = network(), network()
    optimizer = flat(module)
    inputs = torch.ones(1, 3, dtype=torch.float64)
    module.zero_grad()
    with pytest.raises(
        ConfigError, match=r"optimizer: a gradient was put in place .*with the optimizer's zero_grad\(\)"
    ):
        optimizer.step()
    module(inputs).sum().backward()
    with pytest.raises(ConfigError, match="optimizer: a gradient was put in place"):
        optimizer.step()
    train(module, optimizer, range(2))
    train(other, flat(other), range(2))
    assert first_difference(module.state_dict(), other.state_dict()) is None
