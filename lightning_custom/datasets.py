"""Real data sets as tensors: scikit-learn's digits, which need no download, and Fashion-MNIST from a folder."""

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

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
    if data_root is None:
        raise ConfigError("data_root: none, but data fashion-mnist needs one; give --data_root DIR")
    raw = Path(data_root) / "FashionMNIST" / "raw"
    split = "train" if train else "t10k"
    names = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    if not all(_exists(raw / name) for name in names):
        _download_fashion_mnist(data_root, raw)
    images, labels = (_read_idx(raw / name) for name in names)
    return Images(
        torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1,
        torch.from_numpy(labels.astype(np.int64)),
        10,
    )


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(f"{path.name}.gz").exists()


def _download_fashion_mnist(data_root: str, raw: Path) -> None:
    remedy = (
        f"put Fashion-MNIST's idx files into {raw}, or install torchvision with pip install 'lightning-custom[vision]'"
    )
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise ConfigError(f"data_root: {data_root} holds no FashionMNIST/raw; {remedy}") from error
    try:
        FashionMNIST(data_root, download=True)
    except Exception as error:
        raise ConfigError(
            f"data_root: Fashion-MNIST could not be downloaded to {data_root} ({error}); {remedy}"
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """An array in the idx format: two zero bytes, a type code (8: uint8), the number of axes, their sizes, the data."""
    zipped = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    try:
        zeros, code, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if (zeros, code) != (0, 8):
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (struct.error, ValueError) as error:
        raise ConfigError(f"data_root: {path} is damaged ({error}); delete it and fetch it again") from error
