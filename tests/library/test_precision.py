import copy

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.func import functional_call

from lightning_custom.adversarial import squared_gradient_norms
from lightning_custom.ema import EMA
from lightning_custom.errors import ConfigError
from lightning_custom.precision import FullDouble, bare, refuse_loss_scale, unwrap
from lightning_custom.testing import single_process

TOLERANCES = {"32-true": 1e-5, "bf16-mixed": 3e-2, "16-mixed": 3e-3, "bf16-true": 3e-2, "64-true": 1e-12}
precisions = pytest.mark.parametrize("precision", TOLERANCES)


def make_fabric(precision, *, stock=False):
    if precision == "16-mixed":  # Fabric replaces it on the CPU unless it comes as a plugin
        scaler = torch.amp.GradScaler(device="cpu", init_scale=256.0)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    if precision == "64-true" and not stock:
        return Fabric(accelerator="cpu", devices=1, plugins=[FullDouble()])
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def make_samples(dtype=torch.float32):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def penalty_gradients(network):
    """Gradients of R1 in float64, by plain PyTorch."""
    network, samples = copy.deepcopy(network).double(), make_samples(torch.float64)
    (gradient,) = torch.autograd.grad(network(samples).sum(), samples, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(1).mean(), list(network.parameters()), allow_unused=True)


def relative_error(actual, expected):
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None and e.abs().max() > 0]
    difference = sum(float((a.double() - e).square().sum()) for a, e in pairs)
    return (difference / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5


@precisions
def test_a_gradient_penalty_is_right(precision):
    fabric, network = make_fabric(precision), make_network()
    expected = penalty_gradients(network)
    module, _ = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
    samples = make_samples(torch.float64 if precision == "64-true" else torch.float32)
    logits = bare(fabric, module)(samples).squeeze(1)
    fabric.backward(squared_gradient_norms(logits, samples).mean())
    scale = fabric.strategy.precision.scaler.get_scale() if precision == "16-mixed" else 1.0
    actual = [None if p.grad is None else p.grad.double() / scale for p in module.parameters()]
    assert relative_error(actual, expected) < TOLERANCES[precision]


@precisions
def test_outputs_are_at_least_float32(precision):
    fabric = make_fabric(precision)
    output = bare(fabric, fabric.setup(make_network()))(make_samples())
    assert output.dtype == (torch.float64 if precision == "64-true" else torch.float32)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_wrapper_refuses_a_gradient_penalty_in_mixed_precision(precision):
    fabric = make_fabric(precision)
    module, samples = fabric.setup(make_network()), make_samples()
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):
        squared_gradient_norms(module(samples).squeeze(1), samples)


@torch.no_grad()
def test_the_stock_wrapper_loses_half_the_digits_of_float64():
    fabric, network = make_fabric("64-true", stock=True), make_network()
    expected = copy.deepcopy(network).double()(make_samples(torch.float64))
    module = fabric.setup(network)
    stock = module(make_samples(torch.float64))
    kept = bare(make_fabric("64-true"), module)(make_samples(torch.float64))
    assert float((kept - expected).abs().max()) < 1e-15
    assert float((stock.double() - expected).abs().max()) > 1e-10


@precisions
def test_substituted_parameters_are_used_differentiated_and_gone_afterwards(precision):
    fabric, network = make_fabric(precision), make_network()
    reference, samples = copy.deepcopy(network).double(), make_samples()
    module = fabric.setup(network)
    forward, before = bare(fabric, module), list(unwrap(module).parameters())
    factor = torch.tensor(1.5, requires_grad=True)
    output = forward(samples, parameters={name: p * factor for name, p in unwrap(module).named_parameters()}).sum()
    (gradient,) = torch.autograd.grad(output, factor)

    exact_factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    substituted = {name: p * exact_factor for name, p in reference.named_parameters()}
    exact = functional_call(reference, substituted, (make_samples(torch.float64),)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, exact_factor)
    tolerance = 1e-6 if precision == "64-true" else max(TOLERANCES[precision], 1e-5)
    assert output.item() == pytest.approx(exact.item(), rel=tolerance)
    assert gradient.item() == pytest.approx(exact_gradient.item(), rel=tolerance)
    assert all(now is then for now, then in zip(unwrap(module).parameters(), before, strict=True))


@precisions
def test_substitution_through_the_wrapper_leaves_foreign_tensors_behind(precision):
    """Why there is a bare call: a later forward pass runs on what was substituted before."""
    fabric = make_fabric(precision)
    module, samples = fabric.setup(make_network()), make_samples()
    expected = bare(fabric, module)(samples).abs().max()
    zeros = {f"_forward_module.{name}": torch.zeros_like(p) for name, p in unwrap(module).named_parameters()}
    functional_call(module, zeros, (samples,))
    assert expected > 0.01
    assert module(samples).abs().max() == 0


@precisions
def test_a_module_that_stayed_in_float32_runs_under_every_precision(precision):
    fabric, network = make_fabric(precision), make_network()
    exact = copy.deepcopy(network)
    module = fabric.setup(network)
    average = EMA(module, half_life=1.0)
    output = bare(fabric, average.module)(make_samples(torch.float32))
    assert output.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.allclose(output.float(), exact(make_samples()), atol=3e-2)


def test_small_gradients_do_not_vanish_in_float16():
    fabric = make_fabric("16-mixed")
    network = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in network:
        nn.init.constant_(layer.weight, 1e-4)
    module, samples = fabric.setup(network), make_samples()
    logits = bare(fabric, module)(samples).squeeze(1)
    norms = squared_gradient_norms(logits, samples)
    assert torch.allclose(norms, torch.full((4,), 6 * 1e-16), rtol=2e-2)
    (unscaled,) = torch.autograd.grad(bare(fabric, module)(samples).sum(), samples)
    assert unscaled.abs().max() == 0


def test_inputs_of_other_kinds_pass_through():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, batch, scale):
            return {"value": self.table(batch["index"]) * scale, "index": batch["index"]}

    fabric = make_fabric("bf16-true")
    module = fabric.setup(Lookup())
    output = bare(fabric, module)({"index": torch.tensor([0, 2])}, 2.0)
    assert output["index"].dtype == torch.int64
    assert torch.equal(output["value"], 2 * module.table.weight[[0, 2]].float())


def test_a_loss_scale_is_refused_with_the_reason():
    fabric = single_process()
    refuse_loss_scale(fabric, "which is lost")
    fabric.strategy.precision.scaler = object()
    with pytest.raises(ConfigError, match=r"^precision: 16-mixed has a loss scale, which is lost; use bf16-mixed$"):
        refuse_loss_scale(fabric, "which is lost")
