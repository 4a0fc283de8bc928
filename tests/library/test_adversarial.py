import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_custom.adversarial import LOSSES, frozen, squared_gradient_norms

REAL, FAKE = [0.3, -2.0, 5.0, 0.0], [-1.0, 0.5, 4.0, -3.0]


def log1p_exp(x):
    return math.log1p(math.exp(x))


CLOSED_FORMS = {  # per pair of logits: what the discriminator minimises, what the generator does
    "r3": (lambda r, f: log1p_exp(f - r), lambda r, f: log1p_exp(r - f)),
    "nonsaturating": (lambda r, f: log1p_exp(-r) + log1p_exp(f), lambda r, f: log1p_exp(-f)),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
}
losses = pytest.mark.parametrize("name", CLOSED_FORMS)


@losses
def test_a_loss_is_its_closed_form(name):
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    for loss, form in zip(LOSSES[name][:2], CLOSED_FORMS[name], strict=True):
        expected = np.mean([form(r, f) for r, f in zip(REAL, FAKE, strict=True)])
        assert loss(real, fake).item() == pytest.approx(expected, rel=1e-12)


@losses
def test_the_mean_over_equal_parts_is_the_loss_of_the_whole(name):
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    for loss in LOSSES[name][:2]:
        parts = [loss(r, f).item() for r, f in zip(real.chunk(2), fake.chunk(2), strict=True)]
        assert loss(real, fake).item() == pytest.approx(np.mean(parts), rel=1e-12)


@losses
def test_only_a_loss_that_says_so_reads_the_real_logits_for_the_generator(name):
    loss, fake = LOSSES[name], torch.tensor(FAKE)
    if loss.generator_sees_real:
        one, other = loss.generator(torch.tensor(REAL), fake), loss.generator(torch.tensor(REAL) + 1, fake)
        assert one != other
    else:
        assert loss.generator(None, fake) == loss.generator(torch.tensor(REAL), fake)


@pytest.mark.parametrize("logit", [1e3, -1e3])
@losses
def test_extreme_logits_stay_finite(name, logit):
    real, fake = torch.tensor([logit]), torch.tensor([-logit])
    assert all(loss(real, fake).isfinite() for loss in LOSSES[name][:2])


@losses
def test_gradients_through_loss_and_penalty_are_finite_differences(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    names = [key for key, _ in network.named_parameters()]
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)

    def objective(*parameters):
        samples = torch.cat([real, fake]).requires_grad_()
        logits = functional_call(network, dict(zip(names, parameters, strict=True)), (samples,)).squeeze(1)
        r1, r2 = squared_gradient_norms(logits, samples).chunk(2)
        return LOSSES[name].discriminator(*logits.chunk(2)) + 0.7 * r1.mean() + 0.3 * r2.mean()

    parameters = [parameter.detach().requires_grad_() for parameter in network.parameters()]
    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-8)


def test_a_linear_networks_squared_gradient_is_its_squared_weight():
    weight = torch.tensor([[3.0, -4.0]])
    samples = torch.randn(5, 2, requires_grad=True)
    norms = squared_gradient_norms((samples @ weight.T).squeeze(1), samples)
    assert torch.equal(norms, torch.full((5,), 25.0))


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_squared_gradient_norms_are_those_of_each_sample_alone(shape):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.Tanh(), nn.Linear(8, 1)).double()
    samples = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    norms = squared_gradient_norms(network(samples).squeeze(1), samples)
    for sample, norm in zip(samples.detach(), norms, strict=True):
        sample = sample.unsqueeze(0).requires_grad_()
        (gradient,) = torch.autograd.grad(network(sample).sum(), sample)
        assert norm.item() == pytest.approx(gradient.square().sum().item(), rel=1e-12)


def test_the_scale_inside_changes_no_bit():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    samples = torch.randn(8, 4, requires_grad=True)
    logits = network(samples).squeeze(1)
    scaled = squared_gradient_norms(logits, samples)
    (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    plain = gradient.square().flatten(1).sum(1)
    assert torch.equal(scaled, plain)
    first = torch.autograd.grad(scaled.mean(), network[0].weight, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(plain.mean(), network[0].weight)[0])


def test_within_frozen_no_parameter_gets_a_gradient_but_the_input_does():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    samples = torch.randn(3, 2, requires_grad=True)
    with frozen(network):
        network(samples).sum().backward()
    assert network.weight.grad is None
    assert samples.grad is not None
    assert (network.weight.requires_grad, network.bias.requires_grad) == (True, False)


def test_frozen_ends_with_an_error_inside_too():
    network = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), frozen(network):
        raise ZeroDivisionError
    assert network.weight.requires_grad
