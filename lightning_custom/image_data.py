"""The image data sets that a generator can be asked to learn, by name, at any size."""

from typing import Literal

import torch
from lightning.fabric import Fabric
from torch.nn.functional import interpolate, pad

from lightning_custom.datasets import Images, load_images
from lightning_custom.errors import ConfigError
from lightning_custom.extractor import fit_extractor
from lightning_custom.generation import Classifier
from lightning_custom.image_folder import image_folder
from lightning_custom.stacked import StackedExtractor, one_channel, stacked

ImageData = Literal[
    "digits", "mnist", "fashion-mnist", "cifar10", "stacked-mnist", "stacked-fashion-mnist", "folder"
]  # fmt: skip
"""Names that :func:`load_image_data` knows."""

FOLDER_SIZE = 32
"""Side of the images of a folder where none is asked for."""


def load_image_data(name: ImageData, data_root: str | None, size: int = 0) -> Images:
    """The data set ``name``, its training part where it has parts, with sides of ``size``; 0: as it comes."""
    if size and size < 4:
        raise ConfigError(f"image_size: {size}; give at least 4, or 0 for the data's own")
    if name == "folder":
        return image_folder(data_root, size or FOLDER_SIZE)
    if name in ("stacked-mnist", "stacked-fashion-mnist"):
        return stacked(at_size(load_images(name.removeprefix("stacked-"), data_root), size))
    return at_size(load_images(name, data_root), size)


def image_shapes(name: ImageData, size: int = 0) -> list[tuple[int, int, int]]:
    """What :func:`load_image_data` may give as ``(C, H, W)``, without the data: a folder's images are grey or coloured.

    >>> image_shapes("cifar10"), image_shapes("folder", 16)
    ([(3, 32, 32)], [(1, 16, 16), (3, 16, 16)])
    """
    side = size or {"digits": 8, "cifar10": 32, "folder": FOLDER_SIZE}.get(name, 28)
    coloured = name == "cifar10" or name.startswith("stacked-")
    channels = (1, 3) if name == "folder" else (3,) if coloured else (1,)
    return [(count, side, side) for count in channels]


def at_size(data: Images, size: int) -> Images:
    """``data`` with sides of ``size``: grey images at most 4 pixels too small get a black frame, others are resized.

    Resized bilinearly, without aliasing. A ``size`` of 0 leaves the data as it is.
    """
    height, width = data.images.shape[2:]
    if size in (0, height) and size in (0, width):
        return data
    down, right = size - height, size - width
    if data.images.shape[1] == 1 and 0 <= down <= 4 and 0 <= right <= 4:
        frame = (right // 2, right - right // 2, down // 2, down - down // 2)
        return data._replace(images=pad(data.images, frame, value=-1.0))
    images = [interpolate(part, (size, size), mode="bilinear", antialias=True) for part in data.images.split(1000)]
    return data._replace(images=torch.cat(images))


def image_classifier(fabric: Fabric, name: ImageData, data: Images) -> Classifier:
    """What measures samples of ``data``, of the name ``name``: a classifier fitted on it and cached.

    Stacked images are measured a channel at a time. Where there is but one class, the classifier tells in which of
    four directions an image is turned (Gidaris et al. 2018), so that its features mean something.
    """
    if name.startswith("stacked-"):
        return StackedExtractor(fit_extractor(fabric, one_channel(data)))
    return fit_extractor(fabric, data if data.num_classes > 1 else turned(data))


def turned(data: Images) -> Images:
    """Each image in four directions, with the number of quarter turns for a label."""
    count, *shape = data.images.shape
    images = data.images.new_empty(4 * count, *shape)
    for turns, part in enumerate(images.chunk(4)):  # one after another: a large folder fills the memory
        part.copy_(data.images.rot90(turns, (2, 3)))
    return Images(images, torch.arange(4).repeat_interleave(count), 4)
