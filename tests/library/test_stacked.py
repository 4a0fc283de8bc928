import pytest
import torch
from torch import nn

from lightning_custom.datasets import Images
from lightning_custom.errors import ConfigError
from lightning_custom.stacked import StackedExtractor, one_channel, stacked


def numbered(classes=10, size=2):
    """Images whose pixels are all the number of their class, three of each."""
    labels = torch.arange(classes).repeat(3)
    return Images((labels / classes).view(-1, 1, 1, 1).expand(-1, 1, size, size).clone(), labels, classes)


def test_the_label_is_read_off_the_channels_as_digits_of_a_number():
    data = stacked(numbered(), count=400)
    assert data.images.shape == (400, 3, 2, 2)
    digits = (data.images[:, :, 0, 0] * 10).round().long()
    assert torch.equal(digits @ torch.tensor([100, 10, 1]), data.labels)
    assert data.num_classes == 1000


def test_modes_are_drawn_evenly_and_by_the_seed_alone():
    torch.manual_seed(3)
    data = stacked(numbered(4), count=64_000, seed=1)
    counts = data.labels.bincount(minlength=64)
    assert data.num_classes == 64
    # Chi squared with 63 degrees of freedom: 103 is its 99.9th percentile.
    assert ((counts - 1000.0).square() / 1000).sum() < 103
    torch.manual_seed(4)
    assert torch.equal(stacked(numbered(4), count=64_000, seed=1).images, data.images)
    assert not torch.equal(stacked(numbered(4), count=64_000, seed=2).labels, data.labels)
    assert len(stacked(numbered(4)).labels) == 12


def test_one_channel_has_the_class_of_that_channel():
    data = one_channel(stacked(numbered(), count=100))
    assert data.num_classes == 10
    assert torch.equal((data.images[:, 0, 0, 0] * 10).round().long(), data.labels)


class Reader(nn.Module):
    """Reads the class off a pixel, and is sure of it."""

    def forward(self, images):
        pixel = (images[:, 0, 0, 0] * 10).round().long()
        return images.flatten(1), 0.9 * nn.functional.one_hot(pixel, 10) + 0.01


def test_the_mode_of_stacked_images_is_found_and_features_are_those_of_the_channels():
    data = stacked(numbered(), count=300)
    features, probabilities = StackedExtractor(Reader())(data.images)
    assert torch.equal(probabilities.argmax(1), data.labels)
    assert torch.equal(features, data.images.flatten(1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(300))
    assert probabilities.max().item() == pytest.approx(0.91**3)
    changed = data.images.roll(1, dims=1)  # the channels in another order are another mode
    assert not torch.equal(StackedExtractor(Reader())(changed)[1].argmax(1), data.labels)


def test_images_in_colour_are_refused():
    with pytest.raises(ConfigError, match="data: images of 3 channels; stack grey ones"):
        stacked(Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), 1))
