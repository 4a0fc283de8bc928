"""Updates of an inner loop are those of torch's optimizers, and their derivatives those of finite differences."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lightning_custom.inner_optimizers import INNER_OPTIMIZERS, LearnedRates, adam, clip_each_task, momentum, sgd

STEPS, RATE = 6, 0.1
# torch adds eps outside the square root; with next to none both are the same formula.
TINY = 1e-30
OPTIMIZERS = {
    "sgd": (sgd, torch.optim.SGD),
    "momentum": (momentum, partial(torch.optim.SGD, momentum=0.9)),
    "other decay": (partial(momentum, decay=0.5), partial(torch.optim.SGD, momentum=0.5)),
    "adam": (partial(adam, eps=TINY), partial(torch.optim.Adam, eps=TINY)),
    "other betas": (
        partial(adam, betas=(0.5, 0.9), eps=TINY), partial(torch.optim.Adam, betas=(0.5, 0.9), eps=TINY)
    ),
}  # fmt: skip


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start():
    return {"weight": numbers(0, 4, 3), "bias": numbers(1, 3)}


def gradients_at(step):
    return {"weight": numbers(10 + step, 4, 3), "bias": numbers(20 + step, 3)}


def path(optimizer, rates=RATE):
    """The parameters after each update."""
    parameters, memory = start(), {}
    for step in range(STEPS):
        parameters, memory = optimizer(parameters, gradients_at(step), rates, memory)
        yield parameters


def path_of_torch(make, rates):
    """Likewise, by an optimizer that has a group for each parameter."""
    parameters = {name: nn.Parameter(part) for name, part in start().items()}
    optimizer = make([{"params": [part], "lr": rates[name]} for name, part in parameters.items()])
    for step in range(STEPS):
        for name, gradient in gradients_at(step).items():
            parameters[name].grad = gradient
        optimizer.step()
        yield {name: part.detach().clone() for name, part in parameters.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_update_is_that_of_torch(name):
    ours, torchs = OPTIMIZERS[name]
    for found, expected in zip(path(ours), path_of_torch(torchs, {"weight": RATE, "bias": RATE}), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_may_have_a_rate_of_its_own(name):
    ours, torchs = OPTIMIZERS[name]
    rates = {"weight": 0.02, "bias": 0.3}
    as_tensors = {"weight": torch.full((4, 3), 0.02, dtype=torch.float64), "bias": torch.tensor(0.3)}
    as_tensors["bias"] = as_tensors["bias"].double()
    for found, expected in zip(path(ours, as_tensors), path_of_torch(torchs, rates), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_adam_with_its_eps_is_near_torchs():
    for found, expected in zip(path(adam), path_of_torch(torch.optim.Adam, dict.fromkeys(start(), RATE)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [1, 1.0])
def test_a_whole_number_is_a_rate(rate):
    updated, _ = sgd(start(), gradients_at(0), rate, {})
    torch.testing.assert_close(updated["bias"], start()["bias"] - gradients_at(0)["bias"], rtol=0, atol=0)


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_nothing_is_changed_in_place(name):
    optimizer, (parameters, gradients) = INNER_OPTIMIZERS[name], (start(), gradients_at(0))
    _, memory = optimizer(parameters, gradients, RATE, {})
    kept = {key: part.clone() for key, part in memory.items()}
    optimizer(parameters, gradients, RATE, memory)
    for mapping, before in ((parameters, start()), (gradients, gradients_at(0)), (memory, kept)):
        assert mapping.keys() == before.keys()
        assert all(torch.equal(part, before[key]) for key, part in mapping.items())


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_derivatives_of_three_updates_are_those_of_finite_differences(name):
    optimizer = INNER_OPTIMIZERS[name]

    def after_three(weight, rates, *gradients):
        parameters, memory = {"weight": weight}, {}
        for gradient in gradients:
            # A gradient that depends on the parameters, as in an inner loop.
            found = {"weight": gradient * parameters["weight"].sin()}
            parameters, memory = optimizer(parameters, found, {"weight": rates}, memory)
        return parameters["weight"]

    inputs = [numbers(0, 5), numbers(1, 5).abs(), *(numbers(seed, 5) for seed in (2, 3, 4))]
    assert gradcheck(after_three, [part.requires_grad_() for part in inputs])


def test_adam_has_a_derivative_where_a_gradient_is_zero():
    gradient = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    updated, memory = adam({"weight": numbers(0, 2)}, {"weight": gradient}, RATE, {})
    (derivative,) = torch.autograd.grad(updated["weight"].sum(), gradient)
    # The first update is -rate g / sqrt(g^2 + eps^2), whose slope at zero is -rate / eps.
    torch.testing.assert_close(derivative, torch.full_like(derivative, -RATE / 1e-8))
    assert torch.equal(updated["weight"], numbers(0, 2))
    assert float(memory["count"]) == 1


# Clipping


def tasks_gradients():
    """Of three tasks with norms 5, 0.5 and 0."""
    return {
        "weight": torch.tensor([[[3.0, 0.0]], [[0.3, 0.0]], [[0.0, 0.0]]], dtype=torch.float64),
        "bias": torch.tensor([4.0, 0.4, 0.0], dtype=torch.float64),
    }


def test_each_task_is_clipped_by_its_own_norm_over_all_parameters():
    clipped = clip_each_task(tasks_gradients(), 1.0)
    expected = {
        "weight": torch.tensor([[[0.6, 0.0]], [[0.3, 0.0]], [[0.0, 0.0]]], dtype=torch.float64),
        "bias": torch.tensor([0.8, 0.4, 0.0], dtype=torch.float64),
    }
    torch.testing.assert_close(clipped, expected, rtol=0, atol=1e-15)


def test_a_tasks_clipped_gradient_is_that_of_torch():
    gradients = {"weight": numbers(0, 3, 4, 2), "bias": 3 * numbers(1, 3, 2)}
    clipped = clip_each_task(gradients, 2.0)
    for task in range(3):
        parts = [nn.Parameter(part[task].clone()) for part in gradients.values()]
        for part, gradient in zip(parts, gradients.values(), strict=True):
            part.grad = gradient[task].clone()
        torch.nn.utils.clip_grad_norm_(parts, 2.0)
        for part, name in zip(parts, gradients, strict=True):
            torch.testing.assert_close(clipped[name][task], part.grad, rtol=1e-5, atol=0)


def test_clipping_has_the_derivative_of_finite_differences_and_a_finite_one_at_zero():
    def clipped(weight, bias):
        return tuple(clip_each_task({"weight": weight, "bias": bias}, 1.0).values())

    parts = [part[:2].clone().requires_grad_() for part in tasks_gradients().values()]
    assert gradcheck(clipped, parts)
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(clip_each_task({"weight": zero}, 1.0)["weight"].sum(), zero)
    assert torch.equal(derivative, torch.ones_like(zero))


# Learned rates


def test_learned_rates_start_alike_and_are_parameters_by_the_name_of_theirs():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    rates = LearnedRates(dict(network.named_parameters()), 0.25)
    by_name = rates.by_name()
    assert {name: part.shape for name, part in by_name.items()} == {
        name: part.shape for name, part in network.named_parameters()
    }
    assert all((part == 0.25).all() for part in by_name.values())
    assert {id(part) for part in by_name.values()} == {id(part) for part in rates.parameters()}
    assert sum(part.numel() for part in rates.parameters()) == sum(part.numel() for part in network.parameters())


def test_the_gradient_of_a_learned_rate_is_minus_both_gradients_product():
    rates = LearnedRates(start(), RATE).double()
    updated, _ = sgd(start(), gradients_at(0), rates.by_name(), {})
    above = numbers(5, 4, 3)
    (updated["weight"] * above).sum().backward()
    torch.testing.assert_close(rates.by_name()["weight"].grad, -above * gradients_at(0)["weight"], rtol=0, atol=0)
    assert rates.by_name()["bias"].grad is None


def test_learned_rates_are_loaded_by_place_into_those_of_another_network_like_it():
    rates = LearnedRates(start(), RATE).double()
    with torch.no_grad():
        for seed, part in enumerate(rates.parameters()):
            part.copy_(numbers(seed, *part.shape))
    other = LearnedRates(start(), math.pi).double()
    other.load_state_dict(rates.state_dict())
    torch.testing.assert_close(other.by_name(), rates.by_name(), rtol=0, atol=0)
