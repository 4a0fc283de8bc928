import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_custom.denoisers import MLPDenoiser, UNetDenoiser, _Attention
from lightning_custom.errors import ConfigError

SHAPE = (1, 8, 8)
NETWORKS = {
    "mlp": lambda own, classes=3: MLPDenoiser(classes, SHAPE, 16, 2, self_conditioning=own),
    "unet": lambda own, classes=3: UNetDenoiser(classes, SHAPE, 8, self_conditioning=own),
    "unet-of-patches": lambda own, classes=3: UNetDenoiser(classes, SHAPE, 8, 2, self_conditioning=own),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def awake(network):
    """With random numbers in the layers that begin at zero."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return network


def inputs(count=5):
    draw = torch.Generator().manual_seed(0)
    noisy, estimates = torch.randn(2, count, *SHAPE, generator=draw)
    return noisy, torch.linspace(0, 1, count), torch.arange(count) % 4, estimates


@every_network
def test_a_fresh_network_predicts_zeros(name):
    assert torch.equal(NETWORKS[name](True)(*inputs()), torch.zeros(5, *SHAPE))


@every_network
def test_a_prediction_depends_on_its_own_sample_alone(name):
    network, batch = awake(NETWORKS[name](True)), inputs()
    together = network(*batch)
    alone = torch.cat([network(*(part[i : i + 1] for part in batch)) for i in range(5)])
    assert together.std() > 0.1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every_network
def test_a_prediction_depends_on_each_input(name):
    network, batch = awake(NETWORKS[name](True)), inputs()
    before = network(*batch)
    for i, other in enumerate((batch[0] + 0.1, batch[1] + 0.01, (batch[2] + 1) % 4, batch[3] + 0.1)):
        after = network(*batch[:i], other, *batch[i + 1 :])
        assert ((after - before).flatten(1).abs().amax(1) > 1e-4).all()


@every_network
def test_without_labels_and_estimates_a_network_takes_none(name):
    network, (noisy, times, _, _) = awake(NETWORKS[name](False, 0)), inputs()
    assert network(noisy, times, None, None).shape == noisy.shape


def test_attention_is_torchs():
    layer, features = awake(_Attention(8)), inputs()[0].expand(-1, 8, -1, -1) * torch.linspace(-1, 1, 8).view(8, 1, 1)
    parts = layer.enter(layer.norm(features)).flatten(2).transpose(1, 2).chunk(3, dim=2)
    expected = scaled_dot_product_attention(*parts).transpose(1, 2).view_as(features)
    torch.testing.assert_close(layer(features), features + layer.leave(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, patch", [((1, 8, 6), 1), ((1, 7, 7), 1), ((3, 30, 30), 4)])
def test_an_image_that_patches_do_not_divide_is_refused(shape, patch):
    with pytest.raises(ConfigError, match=f"patch: {patch}, but images of {shape[1]}x{shape[2]}"):
        UNetDenoiser(3, shape, 8, patch, self_conditioning=False)
