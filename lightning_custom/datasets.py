"""Real data sets as tensors: scikit-learn's digits, which need no download, and Fashion-MNIST from a folder."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_custom.errors import ConfigError


class Images(NamedTuple):
    """A labelled image data set, in memory."""

    images: Tensor
    """``[N, C, H, W]`` float32 in [-1, 1]."""
    labels: Tensor
    """``[N]`` int64."""
    num_classes: int

    def dataset(self) -> TensorDataset:
        """As a map-style dataset of (image, label)."""
        return TensorDataset(self.images, self.labels)


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Images(
        torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(bunch.target).long(), 10
    )


def fashion_mnist(data_root: str | None, *, train: bool = True) -> Images:
    """Fashion-MNIST (Xiao et al. 2017) from torchvision's layout: ``DATA_ROOT/FashionMNIST/raw``.

    Files may be gzipped. Where they are missing, torchvision downloads them if it is installed.
    """
    return _idx_images("FashionMNIST", "fashion-mnist", data_root, train)


def mnist(data_root: str | None, *, train: bool = True) -> Images:
    """MNIST (LeCun et al. 1998) from ``DATA_ROOT/MNIST/raw``, as :func:`fashion_mnist` reads it."""
    return _idx_images("MNIST", "mnist", data_root, train)


def cifar10(data_root: str | None, *, train: bool = True) -> Images:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, which reads or downloads ``DATA_ROOT/cifar-10-batches-py``."""
    data_root = _require_root("cifar10", data_root)
    data = _torchvision("CIFAR10", data_root, train, f"put CIFAR-10 into {data_root}/cifar-10-batches-py")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Images(images.contiguous(), torch.tensor(data.targets), 10)


def load_images(name: str, data_root: str | None, *, train: bool = True) -> Images:
    """The data set ``name``: digits, fashion-mnist, mnist or cifar10; digits has no parts of its own."""
    if name == "digits":
        return digits()
    return {"fashion-mnist": fashion_mnist, "mnist": mnist, "cifar10": cifar10}[name](data_root, train=train)


def split(data: Images, share: float, *, seed: int = 0) -> tuple[Images, Images]:
    """``data`` without a fixed random ``share`` of its samples, and that share; chosen by ``seed`` alone."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    size = round(share * len(order))
    rest, part = order[size:], order[:size]
    return (
        Images(data.images[rest], data.labels[rest], data.num_classes),
        Images(data.images[part], data.labels[part], data.num_classes),
    )


def _idx_images(folder: str, name: str, data_root: str | None, train: bool) -> Images:
    data_root = _require_root(name, data_root)
    raw = Path(data_root) / folder / "raw"
    part = "train" if train else "t10k"
    files = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    if not all(_exists(raw / file) for file in files):
        _torchvision(folder, data_root, train, f"put its idx files into {raw}")
    images, labels = (_read_idx(raw / file) for file in files)
    return Images(
        torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1, torch.from_numpy(labels.astype(np.int64)), 10
    )


def _require_root(name: str, data_root: str | None) -> str:
    if data_root is None:
        raise ConfigError(f"data_root: none, but data {name} needs one; give --data_root DIR")
    return data_root


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(f"{path.name}.gz").exists()


def _torchvision(kind: str, data_root: str, train: bool, remedy: str) -> Any:
    """torchvision's data set, downloaded if need be; imported only here, since a broken one breaks what imports it."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(
            f"data_root: {data_root} does not hold {kind}; {remedy}, or install torchvision with "
            "pip install 'lightning-custom[vision]'"
        ) from error
    try:
        return getattr(datasets, kind)(data_root, train=train, download=True)
    except Exception as error:
        raise ConfigError(f"data_root: {kind} could not be downloaded to {data_root} ({error}); {remedy}") from error


def _read_idx(path: Path) -> np.ndarray:
    """An array in the idx format: two zero bytes, a type code (8: uint8), the number of axes, their sizes, the data."""
    zipped = path.with_name(f"{path.name}.gz")
    found = path if path.exists() else zipped
    try:
        content = found.read_bytes() if found is path else gzip.decompress(found.read_bytes())
        zeros, code, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if (zeros, code) != (0, 8):
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (struct.error, ValueError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"data_root: {found} is damaged ({error}); delete it and fetch it again") from error
