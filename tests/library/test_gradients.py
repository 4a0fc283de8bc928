import math
from dataclasses import dataclass

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset

from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_
from lightning_custom.errors import ConfigError
from lightning_custom.gradients import (
    Lookahead,
    add_noise_,
    annealed_std,
    centralise_,
    clip_norm_,
    clip_value_,
    gradient_norm,
    sam_ascent,
    unscale_,
)
from lightning_custom.loop import due, seed_step
from lightning_custom.state import capture, mismatches, restore_
from lightning_custom.testing import first_difference, in_processes, largest_difference, single_process


def parameters_with_gradients(*shapes, dtype=torch.float64, device=None):
    """Parameters, each with a normal gradient, and a last one without."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in (*shapes, (2,))]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
    return parameters


def copies_of_gradients(parameters):
    return [parameter.grad.clone() for parameter in parameters[:-1]]


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_clipping_by_norm_is_that_of_torch(share):
    ours, torchs = (parameters_with_gradients((3, 4), (5,), ()) for _ in range(2))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in copies_of_gradients(ours)))
    max_norm = share * norm
    assert float(clip_norm_(iter(ours), max_norm)) == pytest.approx(norm, rel=1e-14)
    nn.utils.clip_grad_norm_(torchs, max_norm)
    for mine, theirs in zip(ours[:-1], torchs[:-1], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-14, atol=0)
    assert float(gradient_norm(ours)) == pytest.approx(min(norm, max_norm), rel=1e-5)
    assert ours[-1].grad is None


def test_norm_of_half_precision_gradients_keeps_its_digits():
    parameters = parameters_with_gradients((90, 100), (3000,), dtype=torch.bfloat16)
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in copies_of_gradients(parameters)))
    assert float(gradient_norm(parameters)) == pytest.approx(exact, rel=1e-6)
    assert float(nn.utils.get_total_norm(copies_of_gradients(parameters))) != pytest.approx(exact, rel=1e-4)
    large = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    large.grad = torch.full((4,), 40000.0, dtype=torch.float16)
    assert float(gradient_norm([large])) == pytest.approx(8e4, rel=1e-3)
    assert clip_norm_([large], 1.0).dtype == torch.float32
    assert large.grad.dtype == torch.float16
    assert float(gradient_norm([large])) == pytest.approx(1.0, rel=1e-3)


def test_without_gradients_the_norm_is_zero():
    assert float(clip_norm_([nn.Parameter(torch.ones(2))], 1.0)) == 0.0


def test_clipping_by_value_cuts_every_entry():
    parameters = parameters_with_gradients((3, 4), (5,))
    before = copies_of_gradients(parameters)
    clip_value_(parameters, 0.5)
    for gradient, was in zip(copies_of_gradients(parameters), before, strict=True):
        assert torch.equal(gradient, was.clamp(-0.5, 0.5))
    assert parameters[-1].grad is None


def test_noise_has_the_given_deviation_and_is_a_function_of_the_generator():
    def noisy(seed):
        parameters = [
            nn.Parameter(torch.zeros(300, 300)),
            nn.Parameter(torch.zeros(90_000)),
            nn.Parameter(torch.zeros(2)),
        ]
        for parameter in parameters[:-1]:
            parameter.grad = torch.ones_like(parameter)
        add_noise_(parameters, 0.25, torch.Generator().manual_seed(seed))
        assert parameters[-1].grad is None
        return torch.stack([gradient.flatten() - 1 for gradient in copies_of_gradients(parameters)])

    noise = noisy(0)
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 * 0.25 / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(0.25, rel=4 / math.sqrt(2 * noise.numel()))
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 4 / math.sqrt(90_000)
    assert torch.equal(noise, noisy(0))
    assert not torch.equal(noise, noisy(1))


def test_variance_of_annealed_noise_is_the_papers():
    for step in (0, 1, 10, 12345):
        assert annealed_std(step, eta=0.3, gamma=0.55) ** 2 == pytest.approx(0.3 / (1 + step) ** 0.55, rel=1e-14)


def test_centralised_gradients_leave_the_sum_of_each_outputs_weights():
    parameters = parameters_with_gradients((3, 4), (5, 2, 3, 3), (6,))
    before = copies_of_gradients(parameters)
    centralise_(parameters)
    linear, convolution, bias = copies_of_gradients(parameters)
    for gradient, was in ((linear, before[0]), (convolution, before[1])):
        assert float(gradient.flatten(1).sum(1).abs().max()) < 1e-14
        offset = (was - gradient).flatten(1)
        torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), rtol=0, atol=1e-14)
    assert torch.equal(bias, before[2])


def test_nothing_waits_for_the_device():
    """Tensors on the meta device have no values: whatever reads one raises."""
    parameters = parameters_with_gradients((3, 4), (5,), device="meta")
    clip_norm_(parameters, 1.0)
    clip_value_(parameters, 1.0)
    add_noise_(parameters, 0.1, torch.Generator())
    centralise_(parameters)
    with sam_ascent(parameters, 0.1):
        pass
    Lookahead(nn.Linear(2, 2, device="meta")).synchronise_()
    with pytest.raises(RuntimeError):
        float(gradient_norm(parameters))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_sam_on_a_quadratic_is_the_closed_form(scale):
    """For w' A w / 2 the step is w - lr A (w + rho A w / |A w|), whatever the scale of the first gradient."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix, start = root @ root.T, torch.randn(5, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer, rho = SGD([weight], lr=0.1), 0.3

    (scale * weight @ matrix @ weight / 2).backward()
    with sam_ascent([weight], rho):
        slope = matrix @ start
        torch.testing.assert_close(weight.detach(), start + rho * slope / slope.norm(), rtol=1e-12, atol=0)
        optimizer.zero_grad()
        (weight @ matrix @ weight / 2).backward()
    assert torch.equal(weight, start)
    optimizer.step()
    expected = start - 0.1 * matrix @ (start + rho * slope / slope.norm())
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


def test_sam_puts_the_weights_back_when_the_second_pass_fails_or_the_gradient_is_not_finite():
    parameters = parameters_with_gradients((3, 4), (5,), dtype=torch.float32)
    parameters[0].grad[0, 0] = math.inf
    before = [parameter.detach().clone() for parameter in parameters]

    def second_pass_that_fails():
        with sam_ascent(parameters, 0.1):
            assert not parameters[0].isfinite().all()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        second_pass_that_fails()
    assert all(map(torch.equal, parameters, before))


def test_sam_without_a_gradient_is_refused():
    with (
        pytest.raises(ConfigError, match=r"parameters: none has a gradient; call fabric.backward"),
        sam_ascent([nn.Parameter(torch.ones(2))], 0.1),
    ):
        pass


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: clip_norm_([], 0.0), "max_norm: 0.0; give a number above 0"),
        (lambda: clip_norm_([], math.nan), "max_norm: nan"),
        (lambda: clip_value_([], -1.0), "max_value: -1.0; give a number above 0"),
        (lambda: add_noise_([], -1.0, torch.Generator()), "std: -1.0; give 0 or more"),
        (lambda: sam_ascent([], 0.0).__enter__(), "rho: 0.0; give a number above 0"),
        (lambda: Lookahead(nn.Linear(1, 1), alpha=0.0), "alpha: 0.0; give a share above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def half_precision_fabric():
    # Fabric itself turns 16-mixed into bf16-mixed on a CPU.
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu")])


@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_gradients_are_the_true_ones_and_the_step_takes_them_as_they_are(fused):
    fabric = half_precision_fabric()
    module = nn.Linear(3, 1, bias=False)
    nn.init.ones_(module.weight)
    model, optimizer = fabric.setup(module, Adam(module.parameters(), lr=0.5, eps=1.0, fused=fused))
    inputs = torch.tensor([[0.5, 1.0, 2.0]])
    fabric.backward(model(inputs).sum() / 16)
    assert torch.equal(module.weight.grad, 65536 * inputs / 16)
    unscale_(fabric, optimizer)
    assert torch.equal(module.weight.grad, inputs / 16)
    clip_norm_(model.parameters(), 0.01)
    clipped = module.weight.grad.clone()
    optimizer.step()
    # Adam's first step is lr g / (|g| + eps): with this eps it shows the size of the gradient.
    torch.testing.assert_close(module.weight.detach(), 1 - 0.5 * clipped / (clipped.abs() + 1))


def test_a_step_with_an_infinite_gradient_is_left_out_after_unscaling_and_clipping():
    fabric = half_precision_fabric()
    model, optimizer = fabric.setup(module := nn.Linear(3, 1), SGD(module.parameters(), lr=0.5))
    fabric.backward(model(torch.ones(1, 3)).sum() / 16)
    assert module.weight.grad.isfinite().all()
    module.weight.grad[0, 0] = math.inf
    before = module.weight.detach().clone()
    unscale_(fabric, optimizer)
    clip_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert torch.equal(module.weight, before)


def test_unscaling_does_nothing_in_full_precision():
    fabric = single_process()
    model, optimizer = fabric.setup(module := nn.Linear(2, 1), SGD(module.parameters(), lr=0.5))
    fabric.backward(model(torch.ones(1, 2)).sum())
    unscale_(fabric, optimizer)
    assert torch.equal(module.weight.grad, torch.ones(1, 2))


def test_lookahead_goes_alpha_of_the_way_that_the_optimizer_went():
    module = nn.Linear(2, 1, bias=False)
    start = module.weight.detach().clone()
    optimizer, lookahead = SGD(module.parameters(), lr=0.1), Lookahead(module, alpha=0.25)
    for step in range(1, 13):
        module.weight.grad = torch.tensor([[1.0, -2.0]])
        optimizer.step()
        if due(step, 4):
            lookahead.synchronise_()
            assert torch.equal(module.weight, lookahead.weights["weight"])
    # Three times four steps, a quarter of each four kept.
    torch.testing.assert_close(module.weight.detach(), start - 0.1 * 3 * torch.tensor([[1.0, -2.0]]))


@dataclass
class LookaheadState:
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lookahead: Lookahead
    step: int = 0


def lookahead_state(seed):
    torch.manual_seed(seed)
    module, optimizer = single_process().setup(module := nn.Linear(3, 2), Adam(module.parameters(), lr=0.1))
    return LookaheadState(module, optimizer, Lookahead(module))


def advance_with_lookahead(state, until):
    while state.step < until:
        generator = torch.Generator().manual_seed(state.step)
        state.optimizer.zero_grad()
        state.module(torch.randn(4, 3, generator=generator)).square().sum().backward()
        state.optimizer.step()
        state.step += 1
        if due(state.step, 5):
            state.lookahead.synchronise_()


def test_lookahead_resumes_from_a_checkpoint_between_synchronisations(tmp_path):
    straight = lookahead_state(0)
    advance_with_lookahead(straight, 7)
    torch.save(capture(straight), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    advance_with_lookahead(straight, 14)

    resumed = lookahead_state(1)
    assert mismatches(resumed, stored, {}) == []
    restore_(resumed, stored, {})
    advance_with_lookahead(resumed, 14)
    assert first_difference(capture(straight), capture(resumed)) is None

    forgetful = lookahead_state(1)
    restore_(forgetful, stored, {})
    forgetful.lookahead = Lookahead(forgetful.module)
    advance_with_lookahead(forgetful, 14)
    assert first_difference(capture(straight), capture(forgetful)) is not None


def train_with(fabric, variant):
    """The parameters after 30 steps of a small classifier with a global batch of 8."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1, momentum=0.9))
    lookahead = Lookahead(model)
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    batches = Batches(fabric, TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8, seed=0)
    for step in range(30):
        rng = seed_step(0, step, fabric)
        images, labels = next(batches)
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(images), labels))
        if variant != "sam, not averaged":
            mean_gradients_(fabric, model)
        if variant.startswith("sam"):
            with sam_ascent(model.parameters(), 0.05):
                optimizer.zero_grad()
                fabric.backward(cross_entropy(model(images), labels))
            mean_gradients_(fabric, model)
        elif variant == "tools":
            centralise_(model.parameters())
            clip_norm_(model.parameters(), 0.5)
            add_noise_(model.parameters(), annealed_std(step), rng.shared)
        elif variant == "local noise":
            add_noise_(model.parameters(), annealed_std(step), rng.local)
        optimizer.step()
        if due(step + 1, 5):
            lookahead.synchronise_()
    return dict(module.state_dict())


VARIANTS = ("sam", "sam, not averaged", "tools", "local noise")


def train_with_each(fabric):
    return {variant: train_with(fabric, variant) for variant in VARIANTS}


@pytest.mark.distributed
def test_two_processes_equal_one():
    one = train_with_each(single_process("64-true"))
    two = in_processes(train_with_each, 2, precision="64-true")
    for variant in ("sam", "tools"):
        assert first_difference(two[0][variant], two[1][variant]) is None
        assert largest_difference(one[variant], two[0][variant]) < 1e-9
    assert largest_difference(one["sam"], one["tools"]) > 1e-3, "the tools change nothing"
    # Controls: what the averaging before the ascent, and the shared generator, are for.
    assert largest_difference(one["sam, not averaged"], two[0]["sam, not averaged"]) > 1e-6
    assert first_difference(two[0]["local noise"], two[1]["local noise"]) is not None
