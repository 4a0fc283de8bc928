"""The penalties of recipes.gan, by weights that are known, and their lazy updates."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.optim import Adam

from lightning_custom.augmentation import diff_augment
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.networks import MLPGenerator
from lightning_custom.penalties import Verdict, penalties
from lightning_custom.testing import single_process
from recipes import gan
from tests.recipes.cases import CASES, run_gan

BATCH, SHAPE = 6, (1, 8, 8)
NONE = {"r1": 0.0, "r2": 0.0, "batch_size": BATCH, "num_classes": 0}
CONFIG = CASES[0].config


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def penalty_of(network, samples, **weights):
    """What the recipe adds to the loss for ``samples``, half of them real."""
    config = gan.GANConfig(**{**NONE, **weights})

    def judge(images, label, draw, part):
        return Verdict(network(images))

    samples = samples.detach().requires_grad_()
    return penalties(single_process(), config, judge, samples, network(samples), [], generator())


def both_kinds():
    return torch.randn(2 * BATCH, *SHAPE, dtype=torch.float64, generator=generator(1))


@pytest.mark.parametrize(
    "weights, expected",
    [
        ({"r1": 2.0}, 2.0 / 2 * 9),
        ({"r2": 5.0}, 5.0 / 2 * 9),
        ({"gp": 10.0}, 10.0 * (3 - 1) ** 2),
        ({"dragan": 7.0}, 7.0 * (3 - 1) ** 2),
        ({"r1": 2.0, "r2": 5.0, "gp": 10.0, "dragan": 7.0}, 2.0 / 2 * 9 + 5.0 / 2 * 9 + 10.0 * 4 + 7.0 * 4),
        ({}, 0.0),
    ],
)
def test_penalties_on_a_linear_discriminator_of_slope_3_are_their_closed_forms(weights, expected):
    direction = torch.randn(64, dtype=torch.float64, generator=generator(2))
    direction *= 3 / direction.norm()
    total = penalty_of(lambda images: images.flatten(1) @ direction, both_kinds(), **weights)
    assert total.item() == pytest.approx(expected, rel=1e-9)


def test_r1_alone_and_r2_alone_are_the_parts_of_both_together_and_so_are_their_gradients():
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 1, bias=False), nn.Flatten(0))
    layer, samples = layer.double(), both_kinds()
    found = {}
    for weights in ({"r1": 2.0}, {"r2": 3.0}, {"r1": 2.0, "r2": 3.0}):
        total = penalty_of(layer, samples, **weights)
        found[tuple(weights)] = [total, *torch.autograd.grad(total, [layer[1].weight, layer[3].weight])]
    for alone, other, both in zip(found["r1",], found["r2",], found["r1", "r2"], strict=True):
        torch.testing.assert_close(alone + other, both, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight, seen", [("r1", slice(0, BATCH)), ("r2", slice(BATCH, None))])
def test_one_of_r1_and_r2_sees_its_own_kind_of_sample_alone(weight, seen):
    samples, passes = both_kinds(), []

    def network(images):
        passes.append(images.detach().clone())
        return images.flatten(1).square().sum(1)

    penalty_of(network, samples, **{weight: 1.0})
    assert torch.equal(passes[-1], samples[seen])


@pytest.mark.parametrize("weight, where", [("gp", "between"), ("dragan", "around")])
def test_where_a_penalty_looks(weight, where):
    """A discriminator ``|x|^2 / 2`` has the gradient ``x``, whose norm tells at which samples it was taken."""
    real = torch.full((BATCH, *SHAPE), 0.5, dtype=torch.float64)
    samples = torch.cat([real, -real])
    found = penalty_of(lambda images: images.square().flatten(1).sum(1) / 2, samples, **{weight: 1.0})
    if where == "between":
        mix = torch.rand(BATCH, generator=generator()).double().view(-1, 1, 1, 1)
        looked_at = mix * real - (1 - mix) * real
    else:
        looked_at = real + 0.25 * torch.randn(BATCH, *SHAPE, generator=generator())
    expected = (looked_at.flatten(1).norm(dim=1) - 1).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_consistency_is_the_squared_change_of_logits_for_each_kind():
    samples = both_kinds()
    direction = torch.randn(64, dtype=torch.float64, generator=generator(2))

    def network(images):
        return images.flatten(1) @ direction

    moved = diff_augment(single_process(), samples, ("translation",), generator(), batches=2)
    changes = (network(moved) - network(samples)).square()
    expected = 10.0 * (changes[:BATCH].mean() + changes[BATCH:].mean())
    assert expected > 1
    assert penalty_of(network, samples, bcr=10.0).item() == pytest.approx(expected.item(), rel=1e-12)
    # A discriminator that looks at no place in particular has nothing to pay for a move that loses no pixel.
    inner = torch.nn.functional.pad(torch.randn(2 * BATCH, 1, 4, 4, dtype=torch.float64), (2, 2, 2, 2))
    assert penalty_of(lambda images: images.flatten(1).sum(1), inner, bcr=10.0).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("weights", [{"gp": 10.0}, {"dragan": 10.0}, {"bcr": 10.0}, {"r1": 1.0, "r2": 0.5}], ids=str)
def test_gradients_through_a_penalty_are_finite_differences(weights):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)
    ).double()
    names, samples = [name for name, _ in network.named_parameters()], both_kinds()

    def objective(*parameters):
        def call(images):
            return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (images,)).squeeze(1)

        return penalty_of(call, samples, **weights)

    parameters = [parameter.detach().requires_grad_() for parameter in network.parameters()]
    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES[0].configs())
def test_every_variant_begins_in_bf16_mixed_with_the_losses_of_float32(name, tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        run_dir = str(tmp_path / precision)
        config = CASES[0].configs()[name]
        config = dataclasses.replace(config, steps=1, log_every=1, penalty_every=1, run_dir=run_dir)
        state = run_gan(single_process(precision), config)
        assert {parameter.dtype for parameter in state.discriminator.parameters()} == {torch.float32}
        found.append({tag: value for tag, value in read_rows(run_dir)[0].items() if tag.startswith("loss/")})
    assert found[1] == pytest.approx(found[0], rel=2e-2, abs=2e-3)
    assert found[1] != found[0]


def losses_and_steps(tmp_path, monkeypatch, **fields):
    """The rows of a short run, and how often each of its optimizers stepped."""
    steps = {}
    step = Adam.step

    def counted(self, *arguments, **options):
        steps[id(self)] = steps.get(id(self), 0) + 1
        return step(self, *arguments, **options)

    monkeypatch.setattr(Adam, "step", counted)
    config = dataclasses.replace(CONFIG, steps=6, log_every=1, validate_every=0, run_dir=str(tmp_path), **fields)
    state = run_gan(single_process(), config)
    return read_rows(tmp_path), sorted(steps.values()), state


def test_a_lazy_penalty_has_an_update_of_its_own_at_its_interval(tmp_path, monkeypatch):
    rows, steps, state = losses_and_steps(tmp_path, monkeypatch, penalty_every=3, d_betas=(0.5, 0.99))
    assert ["loss/penalty" in row for row in rows if "loss/generator" in row] == [False, False, True] * 2
    assert steps == [6, 8]
    (group,) = state.d_optimizer.param_groups
    assert group["lr"] == pytest.approx(CONFIG.d_lr * 0.75)
    assert group["betas"] == pytest.approx((0.5**0.75, 0.99**0.75))
    assert state.g_optimizer.param_groups[0]["lr"] == CONFIG.g_lr


def test_the_interval_counts_discriminator_updates(tmp_path, monkeypatch):
    rows, steps, _ = losses_and_steps(tmp_path, monkeypatch, penalty_every=4, d_steps=2)
    assert ["loss/penalty" in row for row in rows if "loss/generator" in row] == [False, True] * 3
    assert steps == [6, 15]


def test_a_lazy_penalty_weighs_as_much_as_its_interval(tmp_path, monkeypatch):
    taken = []
    backward = gan.Fabric.backward
    monkeypatch.setattr(
        gan.Fabric, "backward", lambda self, loss: (taken.append(float(loss.detach())), backward(self, loss))
    )
    rows, *_ = losses_and_steps(tmp_path, monkeypatch, penalty_every=3)
    logged = [row["loss/penalty"] for row in rows if "loss/penalty" in row]
    # Of each three steps: discriminator and generator, twice, then discriminator, penalty, generator.
    assert taken[5::7] == pytest.approx([3 * value for value in logged], rel=1e-6)
    assert logged[0] > 0


def test_a_step_has_as_many_generator_updates_as_asked_for_each_on_samples_of_its_own(tmp_path, monkeypatch):
    seen = []
    forward = MLPGenerator.forward
    monkeypatch.setattr(
        MLPGenerator,
        "forward",
        lambda self, latent, *label: (seen.append(latent), forward(self, latent, *label))[1],
    )
    _, steps, _ = losses_and_steps(tmp_path, monkeypatch, g_steps=3)
    assert steps == [6, 18]
    training = [latent for latent in seen if latent.shape == (CONFIG.batch_size, CONFIG.latent_size)]
    assert len(training) == len({latent.sum().item() for latent in training}) == 18


def test_lazily_without_a_penalty_is_refused():
    with pytest.raises(ConfigError, match="penalty_every: 4, but no penalty has a weight; set r1"):
        gan.GANConfig(r1=0.0, r2=0.0, penalty_every=4)
