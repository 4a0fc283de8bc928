"""A recorded function and its gradient are the function and its gradient, second order included."""

import pytest
import torch
from torch.nn.functional import mse_loss

from lightning_custom import compiled_gradient
from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.errors import ConfigError


class Counted:
    """An inner step and an outer loss, which counts how often Python runs it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, parameters, inputs, targets):
        self.calls += 1
        inner = mse_loss(inputs @ parameters["weight"] + parameters["bias"], targets)
        gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        weight, bias = (
            part - 0.1 * gradient for part, gradient in zip(parameters.values(), gradients, strict=True)
        )  # fmt: skip
        loss = mse_loss((inputs.flip(0) @ weight + bias).tanh(), targets)
        return loss, {"loss": loss, "inner": inner}


def parameters():
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for name, shape in (("weight", (3, 2)), ("bias", (2,)))
    }


def samples(seed=1, size=4):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=draw, dtype=torch.float64) for width in (3, 2)]


def expected_at(learned, inputs, targets):
    total, values = Counted()(learned, inputs, targets)
    return total.detach(), values, torch.autograd.grad(total, list(learned.values()))


def assert_close(found, expected, tolerance=1e-14):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture
def recorded(monkeypatch):
    """The records that would be compiled: they are run as they are."""
    records = []

    def keep(record, examples):
        records.append(record)
        return record

    monkeypatch.setattr(compiled_gradient, "compile_graph", keep)
    return records


def test_total_values_and_gradient_are_the_functions_at_every_call(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    for seed in range(3):
        expected, values, gradients = expected_at(learned, *samples(seed))
        total, found = compiled(learned, *samples(seed))
        assert_close(total.detach(), expected)
        assert_close(found, {name: value.detach() for name, value in values.items()})
        assert not any(value.requires_grad for value in found.values())
        assert_close(torch.autograd.grad(total, list(learned.values())), gradients)
        with torch.no_grad():
            learned["weight"].mul_(0.9)  # as an optimizer would, in place
    assert len(recorded) == 1


def test_python_runs_the_function_once_for_each_set_of_shapes(recorded):
    function, learned = Counted(), parameters()
    compiled = CompiledGradient(function)
    for size, calls in ((4, 1), (4, 1), (7, 2), (4, 2), (7, 2)):
        total, _ = compiled(learned, *samples(size=size))
        assert function.calls == calls
        assert_close(torch.autograd.grad(total, list(learned.values())), expected_at(learned, *samples(size=size))[2])


def test_another_dtype_and_another_leaf_to_learn_are_recorded_anew(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    compiled(learned, *samples())
    single = {name: part.detach().float().requires_grad_() for name, part in learned.items()}
    total, _ = compiled(single, *(part.float() for part in samples()))
    assert total.dtype == torch.float32
    inputs, targets = samples()
    total, _ = compiled(learned, inputs.requires_grad_(), targets)
    (found,) = torch.autograd.grad(total, inputs)
    assert len(recorded) == 3
    again = samples()[0].requires_grad_()
    assert_close(found, torch.autograd.grad(Counted()(learned, again, targets)[0], again)[0])


def test_a_factor_on_the_total_is_one_on_the_gradient(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    total, _ = compiled(learned, *samples())
    (1024 * total).backward()
    for part, gradient in zip(learned.values(), expected_at(learned, *samples())[2], strict=True):
        assert_close(part.grad / 1024, gradient)


def test_gradients_of_two_calls_add_up(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    for seed in (1, 2):
        compiled(learned, *samples(seed))[0].backward()
    for part, one, other in zip(
        learned.values(), *(expected_at(learned, *samples(seed))[2] for seed in (1, 2)), strict=True
    ):
        assert_close(part.grad, one + other)


def test_the_gradient_has_a_way_back_through_what_made_the_arguments(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(function({**learned, "bias": scale * learned["bias"]}, *samples())[0], scale)
        for function in (compiled, Counted())
    )
    assert_close(found, expected)


def test_an_argument_without_influence_gets_a_gradient_of_zeros_and_one_that_needs_none_gets_none(recorded):
    compiled = CompiledGradient(lambda used, unused, fixed: ((used * fixed).sum(), {}))
    used, unused, fixed = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(2)
    total, values = compiled(used, {"unused": unused}, fixed)
    total.backward()
    assert values == {}
    assert torch.equal(used.grad, torch.ones(2))
    assert torch.equal(unused.grad, torch.zeros(3))
    assert fixed.grad is None


def test_the_gradient_of_the_gradient_is_refused_and_not_silently_wrong(recorded):
    compiled, learned = CompiledGradient(Counted()), parameters()
    total, _ = compiled(learned, *samples())
    gradients = torch.autograd.grad(total**2, list(learned.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


def test_what_cannot_be_recorded_is_refused_with_a_reason_and_a_remedy():
    def decides(number):
        return (number.sum() if number.sum().item() > 0 else -number.sum()), {}

    with pytest.raises(ConfigError, match=r"^compile: the gradient cannot be recorded \(.+\); leave --compile out$"):
        CompiledGradient(decides)(torch.ones(2, requires_grad=True))


def test_a_refusal_of_the_functions_own_keeps_its_remedy():
    def refuses(number):
        raise ConfigError("targets: none; give some")

    with pytest.raises(ConfigError, match=r"^targets: none; give some$"):
        CompiledGradient(refuses)(torch.ones(2, requires_grad=True))


def test_the_record_holds_second_order_and_not_the_first_alone(recorded):
    learned = parameters()
    total, _ = CompiledGradient(Counted())(learned, *samples())
    found = torch.autograd.grad(total, learned["weight"])[0]

    inputs, targets = samples()
    inner = mse_loss(inputs @ learned["weight"] + learned["bias"], targets)
    gradients = [part.detach() for part in torch.autograd.grad(inner, list(learned.values()))]
    weight, bias = (part - 0.1 * gradient for part, gradient in zip(learned.values(), gradients, strict=True))
    first_order = torch.autograd.grad(mse_loss((inputs.flip(0) @ weight + bias).tanh(), targets), learned["weight"])[0]
    assert (found - first_order).norm() > 1e-2 * found.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_a_compiled_gradient_is_compiled_once_and_runs_no_python_of_the_function():
    from torch._inductor import metrics

    metrics.reset()
    function, kernels = Counted(), []
    compiled, learned = CompiledGradient(function), parameters()
    for seed in range(3):
        total, values = compiled(learned, *samples(seed))
        expected, _, gradients = expected_at(learned, *samples(seed))
        assert_close(total.detach(), expected, 1e-12)
        assert_close(values["loss"], expected, 1e-12)
        assert_close(torch.autograd.grad(total, list(learned.values())), gradients, 1e-12)
        assert function.calls == 1
        kernels.append(metrics.generated_kernel_count)
    assert kernels[0] >= 1
    assert set(kernels) == {kernels[0]}
