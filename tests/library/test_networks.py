import copy

import pytest
import torch
from torch import nn

from lightning_custom.networks import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator, with_label

SHAPES = {"mlp": (1, 8, 8), "conv": (3, 12, 12)}
GENERATORS = {"mlp": MLPGenerator, "conv": ConvGenerator}
DISCRIMINATORS = {"mlp": MLPDiscriminator, "conv": ConvDiscriminator}
kinds = pytest.mark.parametrize("kind", SHAPES)
conditions = pytest.mark.parametrize("num_classes", [0, 3])


def pair(kind, num_classes):
    torch.manual_seed(0)
    generator = GENERATORS[kind](5, num_classes, SHAPES[kind], width=8)
    return generator.double(), DISCRIMINATORS[kind](num_classes, SHAPES[kind], width=8).double()


def inputs(num_classes, size=4):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return (latent,) if num_classes == 0 else (latent, torch.arange(size) % num_classes)


@kinds
@conditions
def test_shapes_and_ranges(kind, num_classes):
    generator, discriminator = pair(kind, num_classes)
    latent, *label = inputs(num_classes)
    images = generator(100 * latent, *label)
    assert images.shape == (4, *SHAPES[kind])
    assert -1 <= images.min() < images.max() <= 1
    assert discriminator(images, *label).shape == (4,)


@kinds
@conditions
def test_a_samples_output_does_not_depend_on_its_batch(kind, num_classes):
    generator, discriminator = pair(kind, num_classes)
    latent, *label = inputs(num_classes)
    images = generator(latent, *label)
    logits = discriminator(images, *label)
    for i in range(len(latent)):
        own = [part[i : i + 1] for part in label]
        assert torch.allclose(generator(latent[i : i + 1], *own), images[i : i + 1], rtol=0, atol=1e-13)
        assert torch.allclose(discriminator(images[i : i + 1], *own), logits[i : i + 1], rtol=0, atol=1e-13)
    assert torch.equal(copy.deepcopy(generator).eval()(latent, *label), images)


@kinds
def test_the_label_changes_the_output_where_there_are_classes(kind):
    generator, discriminator = pair(kind, 3)
    latent, label = inputs(3)
    images = generator(latent, label)
    other = (label + 1) % 3
    assert not torch.allclose(generator(latent, other), images)
    assert not torch.allclose(discriminator(images, other), discriminator(images, label))


@kinds
@conditions
def test_no_constant_can_be_added_to_all_logits(kind, num_classes):
    """The last layer has no bias, to which a relativistic loss gives a gradient of mere rounding."""
    _, discriminator = pair(kind, num_classes)
    layers = [layer for layer in discriminator.modules() if isinstance(layer, nn.Linear)]
    assert layers[-1].bias is None


def test_the_projection_is_the_unconditional_logit_plus_the_classes():
    _, discriminator = pair("conv", 3)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    features, weight = discriminator.trunk(images), discriminator.head.weight
    expected = torch.stack([features[0] @ (weight[0] + weight[3]), features[1] @ (weight[0] + weight[1])])
    assert torch.allclose(discriminator(images, torch.tensor([2, 0])), expected, rtol=1e-12)
    assert torch.allclose(discriminator(images), features @ weight[0], rtol=1e-12)


def test_labels_are_one_hot_behind_the_features():
    joined = with_label(torch.ones(2, 1), torch.tensor([1, 0]), 2)
    assert joined.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert with_label(torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([0]), 2).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="label: none, but the network was made for 3 classes; pass labels"):
        pair("mlp", 3)[0](inputs(0)[0])
    for shape in ((1, 8, 12), (1, 10, 10)):
        with pytest.raises(ValueError, match="need square images with sides a multiple of 4"):
            ConvGenerator(5, 0, shape)
        with pytest.raises(ValueError, match="need square images with sides a multiple of 4"):
            ConvDiscriminator(0, shape)
