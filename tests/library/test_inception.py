import importlib
import sys
import types

import pytest
import torch

from lightning_custom import inception
from lightning_custom.errors import ConfigError
from lightning_custom.inception import inception_features
from lightning_custom.testing import single_process


class FakeNetwork(torch.nn.Module):
    """What this project uses of torch-fidelity's network: bytes in colour to a tuple of features."""

    made = 0

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        FakeNetwork.made += 1
        torch.rand(3)  # its initial weights

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        assert len(images) <= 100
        return (images.flatten(1).float(),)


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeNetwork
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    return module


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_sees_bytes_in_three_channels(channels):
    levels = torch.tensor([0, 1, 127, 128, 254, 255])
    images = (levels / 127.5 - 1).view(1, 1, 2, 3).expand(250, channels, 2, 3)
    features = inception_features(single_process())(images)
    assert torch.equal(features, levels.float().repeat(250, 3))
    beyond = inception_features(single_process())(torch.full((1, channels, 1, 1), 1.5))
    assert beyond.unique().tolist() == [255]


@pytest.mark.usefixtures("package")
def test_its_initial_weights_leave_the_default_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    inception_features(single_process())
    assert torch.equal(torch.rand(2), expected)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"inception needs torch-fidelity .*; pip install torch-fidelity"):
        inception_features(single_process())


def test_weights_that_cannot_be_fetched_are_one_line(package):
    def offline(*_):
        raise OSError("no route to host")

    package.FeatureExtractorInceptionV3 = offline
    with pytest.raises(ConfigError, match=r"features: the weights of inception could not be fetched \(no route"):
        inception_features(single_process())


def test_the_core_does_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    importlib.reload(inception)
