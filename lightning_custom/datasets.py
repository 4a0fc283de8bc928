"""Real data sets as tensors: scikit-learn's digits, which need no download, and others from a folder."""

import contextlib
import gzip
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
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
    """CIFAR-10 (Krizhevsky 2009) from ``DATA_ROOT/cifar-10-batches-bin``, its authors' binary version.

    Where that is missing, torchvision reads or downloads ``DATA_ROOT/cifar-10-batches-py`` if it is installed.
    """
    data_root = _require_root("cifar10", data_root)
    folder = Path(data_root) / "cifar-10-batches-bin"
    if folder.is_dir():
        names = [f"data_batch_{number}.bin" for number in range(1, 6)] if train else ["test_batch.bin"]
        rows = np.concatenate([_read_rows(folder / name, 1 + 3 * 32 * 32) for name in names])
        labels, pixels = rows[:, 0].astype(np.int64), rows[:, 1:].reshape(-1, 3, 32, 32)
        return Images(torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(labels), 10)
    data = _torchvision("CIFAR10", data_root, train, f"put its binary version into {folder}")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Images(images.contiguous(), torch.tensor(data.targets), 10)


def _read_rows(path: Path, size: int) -> np.ndarray:
    """``[N, size]`` bytes."""
    try:
        return np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, size).copy()
    except (OSError, ValueError) as error:
        raise ConfigError(f"data_root: {path} is damaged ({error}); delete it and fetch it again") from error


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


def _torchvision(kind: str, data_root: str, train: bool, remedy: str, part: str = "train") -> Any:
    """torchvision's data set, downloaded if need be; imported only here, since a broken one breaks what imports it."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(
            f"data_root: {data_root} does not hold {kind}; {remedy}, or pip install torchvision, which downloads it"
        ) from error
    try:
        with _one_process(Path(data_root)):  # all of a run's processes ask at once
            return getattr(datasets, kind)(data_root, download=True, **{part: train})
    except Exception as error:
        raise ConfigError(f"data_root: {kind} could not be downloaded to {data_root} ({error}); {remedy}") from error


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Let in one of the user's processes on this machine after another; where files cannot be locked, all."""
    user = os.getuid() if hasattr(os, "getuid") else 0  # another user's file could not be opened
    place = f"{user} {folder.resolve()}"
    with (Path(tempfile.gettempdir()) / f"lightning-custom-{zlib.crc32(place.encode()):08x}.lock").open("w") as file:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


OMNIGLOT_FILE = "omniglot-28x28.npz"
"""Omniglot as one file of arrays, in ``data_root``; strokes are 0 in it, as in the original images."""


class Characters(NamedTuple):
    """Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, each drawn by 20 people."""

    images: Tensor
    """``[1623, 20, 28, 28]`` uint8: strokes 255 on background 0; alphabets of the background set come first."""
    evaluation: Tensor
    """``[1623]`` bool: whether the character is of the authors' evaluation set."""
    alphabet: tuple[str, ...]
    """The alphabet of each character."""
    character: tuple[str, ...]
    """The name of each character in its alphabet: ``character01`` and on."""


def omniglot(data_root: str | None) -> Characters:
    """Omniglot from ``DATA_ROOT/omniglot-28x28.npz``; where it is missing, torchvision downloads the images.

    They are then reduced to 28x28 pixels (Lanczos, as Finn et al. 2017 did) and kept as that one file, which takes a
    minute once. With several processes fetch the data before they start.
    """
    data_root = _require_root("omniglot", data_root)
    path = Path(data_root) / OMNIGLOT_FILE
    if not path.exists():
        parts = [
            _torchvision("Omniglot", data_root, background, f"put {OMNIGLOT_FILE} into it", part="background")
            for background in (True, False)
        ]
        _write_arrays(path, _read_characters([Path(part.target_folder) for part in parts]))
    arrays = _read_arrays(path, ("images", "evaluation", "alphabet", "character"))
    return Characters(
        torch.from_numpy(255 - arrays["images"]),
        torch.from_numpy(arrays["evaluation"]),
        tuple(arrays["alphabet"].tolist()),
        tuple(arrays["character"].tolist()),
    )


def split_characters(images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Characters ``[C, ...]`` to train on, to validate with and to test with: 1,100, 100 and the rest, 423.

    Chosen over all characters by ``seed`` alone. The 1,200 that Finn et al. 2017 train on include, in their code, 100
    to validate with.
    """
    if len(images) <= 1200:
        raise ConfigError(f"images: {len(images)} characters; 1,200 are taken to train and validate, give more")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order.tensor_split([1100, 1200])
    return images[train], images[validation], images[test]


def _read_characters(folders: list[Path]) -> dict[str, np.ndarray]:
    """The arrays of the background and the evaluation folder, ``ALPHABET/CHARACTER/*.png``, in the order of names."""
    from PIL import Image

    # Not by way of the data set's own items: their order is the file system's.
    characters = [
        (evaluation, character)
        for evaluation, folder in enumerate(folders)
        for character in sorted(path for path in folder.glob("*/*") if path.is_dir())
    ]
    images = [
        [
            np.asarray(Image.open(drawing).convert("L").resize((28, 28), Image.Resampling.LANCZOS))
            for drawing in sorted(character.glob("*.png"))
        ]
        for _, character in characters
    ]
    return {
        "images": np.stack([np.stack(drawings) for drawings in images]),
        "evaluation": np.array([bool(evaluation) for evaluation, _ in characters]),
        "alphabet": np.array([character.parent.name for _, character in characters]),
        "character": np.array([character.name for _, character in characters]),
    }


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an archive that appears whole or not at all, even where several processes write it."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"data_root: {path} could not be written ({error}); give a folder with room") from error


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        # numpy leaves a file open that it opened itself and found cut.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (KeyError, ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(f"data_root: {path} is damaged ({error}); delete it and fetch it again") from error


def overlaid(data: Images, size: int, *, count: int | None = None, seed: int = 0) -> Images:
    """Pairs of images on one larger canvas, and the labels ``[N, 2]`` of the left and the right one: MultiMNIST.

    The left image lies in the top-left corner of ``[N, C, size, size]``, the right one in the bottom-right, and where
    both are the lighter pixel counts (Sabour et al. 2017, section 5.1, with the corners of Sener and Koltun 2018, who
    take 28x28 to 36x36). ``count`` pairs (none: as many as images) are drawn by ``seed`` alone, so that every image is
    as often on either side as any other, or once less. Split the images first, for pairs of train and test to share
    none:

        train, test = (overlaid(part, 12, count=10 * len(part.labels)) for part in split(digits(), 0.2))
    """
    height, width = data.images.shape[2:]
    if size < max(height, width):
        raise ConfigError(f"size: {size}; the images are {height}x{width}, give at least {max(height, width)}")
    generator = torch.Generator().manual_seed(seed)
    left, right = (_endless_order(len(data.labels), count, generator) for _ in range(2))
    canvas = torch.full((len(left), data.images.shape[1], size, size), -1.0)
    canvas[:, :, :height, :width] = data.images[left]
    corner = canvas[:, :, size - height :, size - width :]
    torch.maximum(corner, data.images[right], out=corner)
    return Images(canvas, torch.stack([data.labels[left], data.labels[right]], dim=1), data.num_classes)


def _endless_order(size: int, count: int | None, generator: torch.Generator) -> Tensor:
    """``count`` indices: pass after pass over all, each in an order of its own."""
    count = size if count is None else count
    passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *passes])[:count]
