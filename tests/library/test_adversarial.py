import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_custom.adversarial import (
    LOSSES,
    frozen,
    interpolated,
    lazy_adam,
    norm_penalty,
    spectrally_normalised,
    squared_gradient_norms,
)
from lightning_custom.ema import EMA
from lightning_custom.errors import ConfigError
from lightning_custom.testing import in_processes, single_process

REAL, FAKE = [0.3, -2.0, 5.0, 0.0], [-1.0, 0.5, 4.0, -3.0]
MEAN_REAL, MEAN_FAKE = 0.825, 0.125


def log1p_exp(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


CLOSED_FORMS = {  # per pair of logits: what the discriminator minimises, what the generator does
    "r3": (lambda r, f: log1p_exp(f - r), lambda r, f: log1p_exp(r - f)),
    "nonsaturating": (lambda r, f: log1p_exp(-r) + log1p_exp(f), lambda r, f: log1p_exp(-f)),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "saturating": (
        lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        lambda r, f: math.log(1 - sigmoid(f)),
    ),
    "lsgan": (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda r, f: 0.5 * (f - 1) ** 2),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic-average": (
        lambda r, f: -math.log(sigmoid(r - MEAN_FAKE)) - math.log(1 - sigmoid(f - MEAN_REAL)),
        lambda r, f: -math.log(sigmoid(f - MEAN_REAL)) - math.log(1 - sigmoid(r - MEAN_FAKE)),
    ),
}
LIBRARYS_OWN = set(LOSSES)  # a user, or a page of the docs whose code runs, may add to them later
BENDS_A_MEAN = {"relativistic-average"}
losses = pytest.mark.parametrize("name", CLOSED_FORMS)


@losses
def test_a_loss_is_its_closed_form(name):
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    for loss, form in zip(LOSSES[name][:2], CLOSED_FORMS[name], strict=True):
        expected = np.mean([form(r, f) for r, f in zip(REAL, FAKE, strict=True)])
        assert loss(real, fake).item() == pytest.approx(expected, rel=1e-12)


def test_every_loss_has_a_closed_form_here():
    assert CLOSED_FORMS.keys() == LIBRARYS_OWN


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS.keys() - BENDS_A_MEAN))
def test_the_mean_over_equal_parts_is_the_loss_of_the_whole(name):
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    for loss in LOSSES[name][:2]:
        parts = [loss(r, f).item() for r, f in zip(real.chunk(2), fake.chunk(2), strict=True)]
        assert loss(real, fake).item() == pytest.approx(np.mean(parts), rel=1e-12)


def local_mean(tensor):
    return tensor.mean()


def relativistic_average_of_a_part(fabric, mean="global"):
    """Both losses on this process's part of logits ``weight * number``, and their gradients by the weight."""
    found = []
    for loss in LOSSES["relativistic-average"][:2]:
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        numbers = torch.tensor([REAL, FAKE], dtype=torch.float64).chunk(fabric.world_size, dim=1)[fabric.global_rank]
        with pytest.MonkeyPatch.context() as patch:
            if mean == "local":
                patch.setattr("lightning_custom.adversarial.global_mean", local_mean)
            value = loss(*(weight * numbers))
        (gradient,) = torch.autograd.grad(value, weight)
        found += [value.item(), gradient.item()]
    return found


def relativistic_average_of_parts(fabric):
    return [relativistic_average_of_a_part(fabric, mean) for mean in ("global", "local")]


@pytest.mark.distributed
def test_the_mean_of_the_relativistic_average_over_processes_is_that_of_the_global_batch():
    whole = relativistic_average_of_a_part(single_process())
    with_global_means, with_local_means = np.mean(in_processes(relativistic_average_of_parts, 2), axis=0)
    assert with_global_means == pytest.approx(whole, rel=1e-12)
    assert abs(with_local_means - whole).min() > 1e-3


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


def test_gradients_through_norm_penalties_are_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    names = [key for key, _ in network.named_parameters()]
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)

    def objective(*parameters):
        samples = interpolated(real, fake, torch.linspace(0, 1, 5)).requires_grad_()
        logits = functional_call(network, dict(zip(names, parameters, strict=True)), (samples,)).squeeze(1)
        # The last bias has no gradient, here an exact zero.
        return 10 * norm_penalty(squared_gradient_norms(logits, samples)) + 0 * parameters[-1].sum()

    parameters = [parameter.detach().requires_grad_() for parameter in network.parameters()]
    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-8)
    assert all(torch.autograd.grad(objective(*parameters), parameters)[i].any() for i in range(3))


def test_a_norm_penalty_is_the_mean_squared_distance_of_norms_from_the_target():
    squares = torch.tensor([0.0, 1.0, 25.0], dtype=torch.float64)
    assert norm_penalty(squares).item() == pytest.approx((1 + 0 + 16) / 3, rel=1e-5)
    assert norm_penalty(squares, target=0.0).item() == pytest.approx(26 / 3, rel=1e-5)


def test_a_norm_penalty_has_a_finite_gradient_where_the_discriminator_is_flat():
    weight = torch.zeros(3, requires_grad=True)
    samples = torch.randn(4, 3, requires_grad=True)
    norm_penalty(squared_gradient_norms(samples @ weight, samples)).backward()
    assert torch.equal(weight.grad, torch.zeros(3))


def test_interpolated_samples_lie_between_a_pair_by_the_number_that_each_pair_has():
    real, fake = torch.ones(3, 1, 2, 2, requires_grad=True), -torch.ones(3, 1, 2, 2)
    between = interpolated(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(between, torch.tensor([-1.0, -0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2))
    assert not between.requires_grad


def test_lazy_adam_remembers_as_much_of_the_loss_as_without_the_extra_updates():
    # Over k updates of the loss there are k + 1 steps: the same decay, and the same way at a constant gradient.
    for k in (1, 4, 16):
        lr, betas = lazy_adam(1e-3, (0.5, 0.99), k)
        steps = k if k == 1 else k + 1
        assert steps * lr == pytest.approx(k * 1e-3, rel=1e-12)
        assert [beta**steps for beta in betas] == pytest.approx([0.5**k, 0.99**k], rel=1e-12)


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


# Spectral norm


def normalised_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 1)
    )
    return spectrally_normalised(network.double())


def singular_values(network):
    return [
        torch.linalg.svdvals(layer.weight.flatten(1))[0].item()
        for layer in network.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]


def test_after_some_forward_passes_the_largest_singular_value_of_each_weight_is_one():
    network = normalised_network()
    for _ in range(100):
        network(torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    network.eval()
    assert singular_values(network) == pytest.approx([1.0] * 3, rel=1e-6)


def test_a_forward_pass_in_training_mode_makes_one_power_iteration_with_or_without_a_gradient():
    network, sample = normalised_network(), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    for passes in (lambda: network(sample), lambda: torch.no_grad()(network)(sample)):
        before = {key: value.clone() for key, value in network.state_dict().items()}
        passes()
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
        assert changed
        assert {key.rpartition(".")[2] for key in changed} <= {"_u", "_v"}
    with frozen(network):
        assert not network(sample).requires_grad
    network.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network(sample)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_penalty_through_spectral_norm_has_the_gradient_of_finite_differences():
    network = normalised_network().eval()  # the power iteration would move between evaluations
    samples = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in network.named_parameters()]

    def objective(*parameters):
        inputs = samples.clone().requires_grad_()
        logits = functional_call(network, dict(zip(names, parameters, strict=True)), (inputs,)).squeeze(1)
        return squared_gradient_norms(logits, inputs).mean()

    parameters = [parameter.detach().requires_grad_() for parameter in network.parameters()]
    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-7)


def test_an_average_of_a_normalised_network_is_the_networks_own_where_it_keeps_nothing():
    network = normalised_network()
    average = EMA(network, half_life=1e-9, ramp=0)
    sample = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    network(sample)
    average.update_(batch_size=1, samples_seen=1)
    assert torch.equal(average.module(sample), network.eval()(sample))


def test_a_weight_of_zeros_has_no_norm():
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ConfigError, match=r"spectral_norm: 0.weight is all zeros"):
        spectrally_normalised(nn.Sequential(layer))
