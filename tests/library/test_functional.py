from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import SGD
from torch.utils.data import TensorDataset

from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_
from lightning_custom.errors import ConfigError
from lightning_custom.functional import cutmix, mixup, orthogonal_penalty, spectral_penalty
from lightning_custom.loop import seed_step
from lightning_custom.testing import first_difference, in_processes, largest_difference, single_process


def weights(*shape, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3, 3)])
def test_orthogonal_penalty_is_zero_exactly_at_orthonormal_weights(shape):
    flat = weights(*shape).flatten(1)
    left, _, right = torch.linalg.svd(flat, full_matrices=False)
    assert float(orthogonal_penalty((left @ right).view(shape))) < 1e-26
    singular = torch.linalg.svdvals(flat)
    assert float(orthogonal_penalty(flat.view(shape))) == pytest.approx(
        float((singular.square() - 1).square().sum()), rel=1e-12
    )


def test_orthogonal_penalty_of_a_tall_matrix_has_the_gradient_of_the_larger_gram_matrix():
    weight = weights(5, 3, requires_grad=True)
    (ours,) = torch.autograd.grad(orthogonal_penalty(weight), weight)
    large = (weight @ weight.T - torch.eye(5, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(large, weight)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 2, 2)])
@pytest.mark.parametrize(
    "penalty",
    [
        orthogonal_penalty,
        spectral_penalty,
        lambda weight: spectral_penalty(weight, iterations=150, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["orthogonal", "spectral", "spectral by power iteration"],
)
def test_gradients_of_penalties_are_those_of_finite_differences(penalty, shape):
    assert gradcheck(penalty, weights(*shape, requires_grad=True))


def test_spectral_penalty_is_the_square_of_the_known_singular_value():
    left, _, right = torch.linalg.svd(weights(4, 6), full_matrices=False)
    weight = (left @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)) @ right).view(4, 2, 3)
    assert float(spectral_penalty(weight)) == pytest.approx(9.0, rel=1e-13)
    values = [
        float(spectral_penalty(weight, iterations=n, generator=torch.Generator().manual_seed(0))) for n in range(1, 40)
    ]
    assert values[:20] == sorted(values[:20]), "every iteration comes nearer, from below"
    assert values[0] < 8.9
    assert values[9] == pytest.approx(9.0, rel=1e-3)
    assert values[-1] == pytest.approx(9.0, rel=1e-12)


def test_penalties_refuse_what_they_cannot_take():
    with pytest.raises(ConfigError, match=r"weight: shape \(3,\); give a matrix or more, and leave biases out"):
        orthogonal_penalty(torch.ones(3))
    with pytest.raises(ConfigError, match="iterations: 0; give at least 1"):
        spectral_penalty(torch.ones(3, 3), iterations=0, generator=torch.Generator())
    with pytest.raises(ConfigError, match="generator: none; power iteration starts at random"):
        spectral_penalty(torch.ones(3, 3), iterations=1)


def constant_images(count, *shape):
    """Image i has the value i everywhere, and the class i."""
    images = torch.arange(count, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(count, *shape)
    return images, torch.arange(count)


NEIGHBOURS = torch.tensor([1, 0, 3, 2, 5, 4])


def test_mixup_blends_neighbours_and_their_targets_in_the_same_share():
    images = weights(6, 2, 4, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    mixed, targets = mixup(images, labels, 3, alpha=0.7, generator=torch.Generator().manual_seed(0))
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[NEIGHBOURS], rtol=0, atol=1e-15)
    hard = one_hot(labels, 3).double()
    torch.testing.assert_close(targets, share * hard + (1 - share) * hard[NEIGHBOURS], rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_share_of_mixup_has_the_beta_distribution(alpha):
    generator = torch.Generator().manual_seed(0)
    images, labels = constant_images(2, 1)
    shares = [float(mixup(images, labels, 2, alpha=alpha, generator=generator)[1][0, 0]) for _ in range(2000)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(shares, stats.beta(2 * alpha, alpha).cdf).pvalue < 1e-6


def test_cutmix_pastes_one_rectangle_and_weighs_targets_by_area():
    images, labels = constant_images(6, 2, 8, 12)
    shares = []
    for seed in range(50):
        mixed, targets = cutmix(images, labels, 6, alpha=1.0, generator=torch.Generator().manual_seed(seed))
        pasted = mixed != images
        assert torch.equal(mixed, torch.where(pasted, images[NEIGHBOURS], images))
        assert (pasted == pasted[:1, :1]).all(), "one rectangle for the whole batch"
        rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
        assert torch.equal(pasted[0, 0], rows[:, None] & columns)
        assert all(int(line.diff().sum()) <= 2 for line in (rows, columns)), "without gaps"
        own = 1 - pasted.flatten(1).double().mean(1)
        torch.testing.assert_close(targets[labels, labels], own, rtol=0, atol=1e-15)
        torch.testing.assert_close(targets[labels, NEIGHBOURS], 1 - own, rtol=0, atol=1e-15)
        shares.append(float(own[0]))
    assert min(shares) < 0.3
    assert max(shares) > 0.95
    assert torch.equal(images, constant_images(6, 2, 8, 12)[0]), "the batch itself is left as it was"


def test_cutmix_leaves_the_drawn_share_where_the_border_cuts_nothing():
    """Over many draws on a large image, uncut rectangles have the area that a uniform share leaves."""
    images, labels = constant_images(2, 1, 400, 400)
    areas = []
    for seed in range(1000):
        mixed, targets = cutmix(images, labels, 2, alpha=1.0, generator=torch.Generator().manual_seed(seed))
        pasted = (mixed != images)[0, 0]
        at_border = pasted[0].any() or pasted[-1].any() or pasted[:, 0].any() or pasted[:, -1].any()
        if not at_border:
            areas.append(1 - float(targets[0, 0]))
    # A square of side s lies inside with probability (1 - s)^2, so areas s^2 = a have density 6 (1 - sqrt(a))^2.
    assert stats.kstest(areas, lambda a: 6 * (a - 4 / 3 * a**1.5 + a**2 / 2)).pvalue > 0.01


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_soft_targets_are_taken_as_they_are_so_that_mixing_can_be_repeated(mix):
    images, labels = constant_images(4, 1, 6, 6)
    probabilities = one_hot(labels, 4).double()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    by_class = mix(images, labels, 4, alpha=1.0, generator=generators[0])
    by_probability = mix(images, probabilities, 4, alpha=1.0, generator=generators[1])
    assert all(map(torch.equal, by_class, by_probability))
    _, targets = mix(*by_class, 4, alpha=1.0, generator=generators[0])
    torch.testing.assert_close(targets.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_does_not_wait_for_the_device(mix):
    images = torch.ones(4, 1, 6, 6, device="meta")
    mixed, targets = mix(
        images, torch.zeros(4, dtype=torch.long, device="meta"), 3, alpha=1.0, generator=torch.Generator()
    )
    assert mixed.shape == images.shape
    assert targets.shape == (4, 3)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_refuses_what_it_cannot_take(mix):
    images, labels = constant_images(4, 1, 6, 6)
    mix = partial(mix, generator=torch.Generator())
    with pytest.raises(ConfigError, match="batch_size: 3 samples on this process; mixing pairs neighbours"):
        mix(images[:3], labels[:3], 4, alpha=1.0)
    with pytest.raises(ConfigError, match=r"images: torch.uint8; turn them into floating point before mixing"):
        mix(images.byte(), labels, 4, alpha=1.0)
    with pytest.raises(ConfigError, match=r"labels: shape \(4, 3\); give \[B\] or \[B, 4\]"):
        mix(images, torch.ones(4, 3), 4, alpha=1.0)
    with pytest.raises(ConfigError, match=r"labels: torch.float32; give class indices \[B\], or \[B, 4\]"):
        mix(images, torch.full((4,), 0.7), 4, alpha=1.0)  # which would be class 0
    with pytest.raises(ConfigError, match=r"alpha: 0.0; give a number above 0, or leave the mixing out"):
        mix(images, labels, 4, alpha=0.0)


def test_cutmix_refuses_what_has_no_height_and_width():
    with pytest.raises(ConfigError, match=r"images: shape \(4, 5\); cutmix needs \[B, ..., height, width\]"):
        cutmix(torch.ones(4, 5), torch.zeros(4, dtype=torch.long), 3, alpha=1.0, generator=torch.Generator())


def mix_with_the_batch_reversed(images, labels, num_classes, *, alpha, generator):
    """Mixup whose partner is at the other end of this process's part: it depends on the number of processes."""
    targets = one_hot(labels, num_classes).to(images.dtype)
    share = float(torch.rand((), generator=generator))
    return tuple(share * part + (1 - share) * part.flip(0) for part in (images, targets))


MIXES = {"mixup": mixup, "cutmix": cutmix, "reversed": mix_with_the_batch_reversed}


def train_with(fabric, mix):
    """The parameters after 30 steps on mixed images, penalties included, with a global batch of 8."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
    images = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    batches = Batches(fabric, TensorDataset(images, images.flatten(1)[:, :3].argmax(1)), batch_size=8, seed=0)
    for step in range(30):
        rng = seed_step(0, step, fabric)
        mixed, targets = mix(*next(batches), 3, alpha=1.0, generator=rng.shared)
        penalty = orthogonal_penalty(module[1].weight) + spectral_penalty(
            module[3].weight, iterations=3, generator=rng.shared
        )
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(mixed), targets, label_smoothing=0.1) + 0.01 * penalty)
        mean_gradients_(fabric, model)
        optimizer.step()
    return dict(module.state_dict())


def train_with_each(fabric):
    return {name: train_with(fabric, mix) for name, mix in MIXES.items()}


@pytest.mark.distributed
def test_two_processes_equal_one():
    one = train_with_each(single_process("64-true"))
    two = in_processes(train_with_each, 2, precision="64-true")
    for name in ("mixup", "cutmix"):
        assert first_difference(two[0][name], two[1][name]) is None
        assert largest_difference(one[name], two[0][name]) < 1e-9
    assert largest_difference(one["mixup"], one["cutmix"]) > 1e-3
    assert largest_difference(one["reversed"], two[0]["reversed"]) > 1e-3
