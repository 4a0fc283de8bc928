import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_custom.errors import ConfigError
from lightning_custom.networks import (
    ConvDiscriminator,
    ConvGenerator,
    FewShotConvNet,
    LeNetTrunk,
    MLPDiscriminator,
    MLPGenerator,
    mlp_head,
    sinusoid_network,
    with_label,
)
from lightning_custom.task_norm import statistics_from

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


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def few_shot_net(norm, num_classes=5, width=8, channels=1):
    torch.manual_seed(0)
    return FewShotConvNet(num_classes, norm=norm, width=width, channels=channels).double()


def test_the_sinusoid_network_is_the_papers():
    network = sinusoid_network()
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [
        (40, 1), (40,), (40, 40), (40,), (1, 40), (1,),
    ]  # fmt: skip
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    first, second, last = network[0], network[2], network[4]
    x = torch.linspace(-5, 5, 7).unsqueeze(1)
    hidden = (x * first.weight.T + first.bias).clamp_min(0)
    hidden = (hidden @ second.weight.T + second.bias).clamp_min(0)
    assert torch.allclose(network(x), hidden @ last.weight.T + last.bias, rtol=0, atol=1e-6)
    assert [type(layer) for layer in sinusoid_network(width=3, layers=0)] == [nn.Linear]
    assert sinusoid_network(width=3, layers=3)(x.expand(7, 2).unsqueeze(2)).shape == (7, 2, 1)


norms = pytest.mark.parametrize("norm", ["batch", "group", "none"])


@norms
def test_the_few_shot_networks_sizes_are_the_papers(norm):
    network = FewShotConvNet(20, norm=norm)
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda _, __, outputs: sizes.append(tuple(outputs.shape[1:])))
        for layer in network.trunk
        if isinstance(layer, nn.Conv2d)
    ]
    assert network(torch.rand(3, 1, 28, 28)).shape == (3, 20)
    assert sizes == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2)]
    assert len(hooks) == 4
    kernels, biases = 9 * (64 + 3 * 64 * 64), 4 * 64
    affine = {"batch": 2 * 4 * 64, "group": 2 * 4 * 64 + biases, "none": biases}[norm]
    assert sum(parameter.numel() for parameter in network.parameters()) == kernels + affine + 65 * 20


@norms
def test_features_are_means_over_space_of_the_last_block(norm):
    network = few_shot_net(norm, channels=3)
    batch = images(4, 3, 20, 20)
    *blocks, _, _ = network.trunk
    maps = nn.Sequential(*blocks)(batch)
    assert maps.shape == (4, 8, 2, 2)
    features = maps.sum((2, 3)) / 4
    logits = features @ network.head.weight.T + network.head.bias
    assert torch.allclose(network(batch), logits, rtol=0, atol=1e-12)


@norms
def test_only_batch_statistics_tie_samples_together(norm):
    network, support, query = few_shot_net(norm), images(6, 1, 12, 12), images(4, 1, 12, 12, seed=1)
    logits = network(query)
    # In pairs, for statistics of the last block's single pixel need two.
    pairs = torch.cat([network(query[:2]), network(query[2:])])
    assert torch.allclose(pairs, logits, rtol=0, atol=1e-12) == (norm != "batch")
    assert torch.equal(copy.deepcopy(network).eval()(query), logits)
    # By the support's statistics the query's samples are apart again.
    with statistics_from(network, 6):
        together = network(torch.cat([support, query]))
        alone = [network(torch.cat([support, sample.unsqueeze(0)]))[6] for sample in query]
    assert torch.allclose(together[6:], torch.stack(alone), rtol=0, atol=1e-12)
    assert torch.allclose(together[:6], network(support), rtol=0, atol=1e-12)


def test_a_bias_before_batch_statistics_would_change_nothing():
    network, batch = few_shot_net("batch"), images(6, 1, 12, 12)
    logits = network(batch)
    assert network.trunk[0].bias is None
    network.trunk[0].bias = nn.Parameter(images(8) + 1)
    assert torch.allclose(network(batch), logits, rtol=0, atol=1e-11)


@norms
def test_second_order_under_vmap_equals_tasks_one_by_one(norm):
    network, tasks = few_shot_net(norm, num_classes=2, width=16), images(3, 4, 1, 16, 16)
    labels = torch.tensor([0, 0, 1, 1])

    def loss(parameters, batch):
        return nn.functional.cross_entropy(functional_call(network, parameters, (batch,)), labels)

    def adapted_loss(parameters, batch):
        gradients = grad(loss)(parameters, batch)
        return loss({name: value - 0.1 * gradients[name] for name, value in parameters.items()}, batch.flip(-1))

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    together = grad(lambda parameters: vmap(adapted_loss, (None, 0))(parameters, tasks).sum())(parameters)
    apart = [grad(adapted_loss)(parameters, task) for task in tasks]
    for name, found in together.items():
        expected = sum(gradients[name] for gradients in apart)
        assert (found - expected).abs().max() < 1e-10 * max(1, expected.abs().max())
        assert expected.abs().max() > 1e-6


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match="norm: layer; choose batch, group or none"):
        FewShotConvNet(5, norm="layer")


def test_the_trunk_is_that_of_the_mgda_paper():
    trunk = LeNetTrunk(1, 36)
    shapes = [tuple(parameter.shape) for parameter in trunk.parameters()]
    assert shapes == [(10, 1, 5, 5), (10,), (20, 10, 5, 5), (20,), (50, 720), (50,)]
    assert [tuple(parameter.shape) for parameter in mlp_head(trunk.features, 10).parameters()] == [
        (50, 50), (50,), (10, 50), (10,),
    ]  # fmt: skip


@pytest.mark.parametrize("size, kernel, padding", [(36, 5, 0), (28, 5, 0), (16, 5, 0), (12, 3, 1), (4, 3, 1)])
def test_the_trunk_takes_other_sizes_and_looks_at_one_image_only(size, kernel, padding):
    torch.manual_seed(0)
    trunk = LeNetTrunk(3, size, width=4, features=7, kernel=kernel, padding=padding).double()
    images = torch.randn(5, 3, size, size, dtype=torch.float64)
    features = trunk(images)
    assert features.shape == (5, 7)
    assert features.std() > 0
    for i in range(5):
        assert torch.allclose(trunk(images[i : i + 1])[0], features[i], rtol=0, atol=1e-13)


def test_a_size_too_small_for_the_kernels_is_refused():
    with pytest.raises(ConfigError, match="size: 12; kernels of 5 pixels with padding 0 leave nothing of it, set kern"):
        LeNetTrunk(1, 12)
