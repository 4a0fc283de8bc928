"""StackedMNIST: three grey images as the colours of one, a thousand modes that can be counted."""

import torch
from torch import Tensor, nn

from lightning_custom.datasets import Images
from lightning_custom.errors import ConfigError


def stacked(data: Images, *, count: int | None = None, seed: int = 0) -> Images:
    """``[N, 3, H, W]`` of three grey images each, drawn by ``seed`` alone (Metz et al. 2017, section 3.3.1).

    The label is the mode: with K classes, ``K^2`` times the class of the first channel, K times that of the second,
    and that of the third. ``count`` is as many as ``data`` has where it is none.
    """
    if data.images.shape[1] != 1:
        raise ConfigError(f"data: images of {data.images.shape[1]} channels; stack grey ones")
    size = len(data.labels) if count is None else count
    index = torch.randint(len(data.labels), (3, size), generator=torch.Generator().manual_seed(seed))
    first, second, third = data.labels[index]
    labels = (first * data.num_classes + second) * data.num_classes + third
    return Images(torch.cat([data.images[channel] for channel in index], dim=1), labels, data.num_classes**3)


def one_channel(data: Images) -> Images:
    """The first channel of stacked images, with the class that it is of: data to fit a classifier on."""
    num_classes = round(data.num_classes ** (1 / 3))
    return Images(data.images[:, :1].contiguous(), data.labels // num_classes**2, num_classes)


class StackedExtractor(nn.Module):
    """The features and the mode of stacked images, by a classifier that looks at each channel.

    ``extractor`` gives features ``[B, F]`` and class probabilities ``[B, K]`` of grey images; this gives ``[B, 3F]``,
    and of each of the ``K^3`` modes the product of the three classes' probabilities.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and probabilities of images ``[B, 3, H, W]``."""
        parts = [self.extractor(channel) for channel in images.split(1, dim=1)]
        first, second, third = (probabilities for _, probabilities in parts)
        modes = torch.einsum("bi,bj,bk->bijk", first, second, third).flatten(1)
        return torch.cat([features for features, _ in parts], dim=1), modes
