"""Generators and discriminators of images: sizes, conditioning, and how they begin."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_custom.errors import ConfigError
from lightning_custom.image_networks import (
    ConditionalDiscriminator,
    HalvedSide,
    ResidualBlock,
    dcgan_trunk,
    discriminator_network,
    generator_network,
    sides,
)

SIZES = [8, 9, 15, 28, 31]
deep = pytest.mark.parametrize("kind", ["dcgan", "residual"])


def seeded(seed=0):
    return torch.manual_seed(seed)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_every_side_from_8_to_128_is_halved_down_to_4_to_7():
    for size in range(8, 129):
        found = sides((1, size, size))
        assert found[0] == size
        assert 4 <= found[-1] <= 7
        assert all(small == large // 2 for large, small in pairwise(found))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@deep
def test_images_of_any_size_are_made_and_every_pixel_is_judged(kind, channels, size):
    seeded()
    shape = (channels, size, size)
    made = generator_network(kind, 5, 2, shape, 4)(torch.randn(3, 5), torch.tensor([0, 1, 1]))
    assert made.shape == (3, *shape)
    assert -1 <= made.min() < made.max() <= 1
    judge = discriminator_network(kind, 2, shape, 4)
    for module in judge.modules():  # a residual branch that begins at zero would see nothing
        if isinstance(module, ResidualBlock):
            nn.init.normal_(module.layers[4].weight)
    sample = made.detach().requires_grad_()
    judge(sample, torch.tensor([0, 1, 1])).sum().backward()
    assert (sample.grad != 0).all()


@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 129, 129), (3, 16, 32)])
@deep
def test_another_size_is_refused(kind, shape):
    for build in (lambda: generator_network(kind, 5, 0, shape, 4), lambda: discriminator_network(kind, 0, shape, 4)):
        with pytest.raises(ConfigError, match="need a square of side 8 to 128"):
            build()


@deep
def test_there_is_no_normalisation_so_samples_do_not_see_each_other(kind):
    seeded()
    network = discriminator_network(kind, 0, (1, 12, 12), 4).double()
    batch = images(4, 1, 12, 12)
    alone = torch.cat([network(image[None]) for image in batch])
    torch.testing.assert_close(network(batch), alone, rtol=0, atol=1e-12)


def test_a_residual_block_begins_as_the_identity_and_its_branch_is_scaled_by_the_number_of_blocks():
    seeded()
    few, many = ResidualBlock(64, 1), ResidualBlock(64, 16)
    features = torch.randn(2, 64, 4, 4)
    assert torch.equal(many(features), features)
    for layer in (0, 2):
        ratio = many.layers[layer].weight.std() / few.layers[layer].weight.std()
        assert ratio.item() == pytest.approx(16**-0.25, rel=0.05)
    assert many.layers[2].groups == 128 // 16


@deep
def test_a_generator_begins_with_images_of_moderate_contrast_at_any_depth(kind):
    for size in (8, 64):
        seeded()
        made = generator_network(kind, 32, 0, (3, size, size), 8)(torch.randn(8, 32))
        assert 0.2 < made.std().item() < 0.8


@pytest.mark.parametrize("side", [6, 7])
def test_halving_loses_no_pixel_and_keeps_a_constant(side):
    image = torch.ones(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    half = HalvedSide()(image)
    assert torch.equal(half, torch.ones(1, 1, 3, 3, dtype=torch.float64))
    (seen,) = torch.autograd.grad(half.sum(), image)
    assert (seen > 0).all()


# Conditioning


def conditional(conditioning, auxiliary=False, num_classes=3):
    seeded()
    inputs = 2 + (num_classes if conditioning == "concatenation" else 0)
    trunk, features = dcgan_trunk(inputs, 8, 4)
    return ConditionalDiscriminator(trunk, features, num_classes, conditioning, auxiliary=auxiliary).double()


def test_concatenation_is_a_plane_of_ones_for_the_class_and_of_zeros_for_the_others():
    network, batch = conditional("concatenation"), images(2, 2, 8, 8)
    planes = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    planes[0, 2] = planes[1, 0] = 1
    expected = network.head(network.trunk(torch.cat([batch, planes], 1)))[:, 0]
    assert torch.equal(network(batch, torch.tensor([2, 0])), expected)


def test_projection_is_an_inner_product_with_the_classes_vector_beside_an_unconditional_logit():
    network, batch = conditional("projection"), images(2, 2, 8, 8)
    features, weight = network.trunk(batch), network.head.weight
    expected = torch.stack([features[0] @ (weight[0] + weight[1 + 2]), features[1] @ (weight[0] + weight[1 + 0])])
    torch.testing.assert_close(network(batch, torch.tensor([2, 0])), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("conditioning", ["projection", "none"])
def test_class_logits_come_beside_the_logits_and_do_not_depend_on_the_label(conditioning):
    network, batch = conditional(conditioning, auxiliary=True), images(2, 2, 8, 8)
    logits, classes = network(batch, torch.tensor([2, 0]))
    other_logits, other_classes = network(batch, torch.tensor([1, 1]))
    assert logits.shape == (2,)
    assert torch.equal(classes, network.head(network.trunk(batch))[:, -3:])
    assert torch.equal(classes, other_classes)
    assert torch.equal(logits, other_logits) == (conditioning == "none")


@pytest.mark.parametrize("conditioning", ["concatenation", "projection", "none"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "dcgan", "residual"])
def test_every_pair_has_every_conditioning(kind, conditioning):
    seeded()
    network = discriminator_network(kind, 3, (1, 8, 8), 8, conditioning).double()
    batch = images(2, 1, 8, 8)
    one, other = network(batch, torch.tensor([0, 1])), network(batch, torch.tensor([1, 2]))
    assert one.shape == (2,)
    assert torch.equal(one, other) == (conditioning == "none")


def test_projection_without_labels_is_refused():
    with pytest.raises(ConfigError, match="made for 3 classes; pass labels"):
        conditional("projection")(images(2, 2, 8, 8))


@deep
def test_second_derivatives_are_finite_differences(kind):
    seeded()
    network = discriminator_network(kind, 0, (1, 9, 9), 2).double()
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.normal_(module.layers[4].weight)
    batch = images(1, 1, 9, 9).requires_grad_()
    direction = images(1, 1, 9, 9).flip(2)

    def slope(sample):
        (gradient,) = torch.autograd.grad(network(sample).square().sum(), sample, create_graph=True)
        return (gradient * direction).sum()

    (analytic,) = torch.autograd.grad(slope(batch), batch)
    step = 1e-6
    ahead, behind = (slope((batch + sign * step * direction).detach().requires_grad_()) for sign in (1, -1))
    assert (analytic * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-5)
