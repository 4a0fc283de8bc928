import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_custom.datasets import digits, fashion_mnist, load_images, mnist, split
from lightning_custom.errors import ConfigError

DATA = Path(os.environ.get("LIGHTNING_CUSTOM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def root(tmp_path):
    """Two images and their labels, in torchvision's layout."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(2 * 28 * 28, dtype=np.uint64).astype(np.uint8).reshape(2, 28, 28)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([3, 9], np.uint8))))
    return tmp_path


def test_digits_are_scikit_learns_scaled_to_one():
    data, bunch = digits(), load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    assert torch.equal((data.images[:, 0] + 1) * 8, torch.from_numpy(bunch.images).float())
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert data.labels.tolist() == bunch.target.tolist()
    assert (data.num_classes, data.labels.dtype) == (10, torch.int64)


def test_a_dataset_pairs_images_with_labels():
    data = digits()
    image, label = data.dataset()[5]
    assert torch.equal(image, data.images[5])
    assert label == data.labels[5]


def test_idx_files_are_read_gzipped_or_not(root):
    data = fashion_mnist(str(root))
    assert data.images.shape == (2, 1, 28, 28)
    assert data.labels.tolist() == [3, 9]
    assert data.images[0, 0, 0, 0] == -1
    assert data.images[0, 0, 9, 3] == 1  # pixel 9 * 28 + 3 = 255
    assert data.images[0, 0, 0, 1].item() == pytest.approx(1 / 127.5 - 1)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", struct.pack(">HBBI", 0, 8, 1, 9) + b"123", struct.pack(">HBBI", 0, 9, 1, 3) + b"123"]
)
def test_a_damaged_file_is_named_with_the_remedy(root, content):
    path = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data_root: {path} is damaged .*delete it and fetch it again"):
        fashion_mnist(str(root))


def test_a_damaged_archive_is_named_with_the_remedy(root):
    path = root / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte.* is damaged .*delete it and fetch it again"):
        fashion_mnist(str(root))


def test_a_missing_directory_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match=rf"data_root: {tmp_path} does not hold FashionMNIST; put its idx files"):
        fashion_mnist(str(tmp_path))
    with pytest.raises(ConfigError, match="data_root: none, but data fashion-mnist needs one"):
        fashion_mnist(None)


def test_mnist_has_the_same_layout_and_names_choose_the_data(root):
    (root / "FashionMNIST").rename(root / "MNIST")
    assert torch.equal(mnist(str(root)).images, load_images("mnist", str(root)).images)
    assert mnist(str(root)).labels.tolist() == [3, 9]


def test_a_split_shares_out_every_sample_once_and_depends_on_its_seed_alone():
    data = digits()
    rest, part = split(data, 0.1, seed=3)
    assert (len(rest.labels), len(part.labels)) == (1617, 180)
    joined = torch.cat([rest.images, part.images]).flatten(1)
    assert sorted(joined.tolist()) == sorted(data.images.flatten(1).tolist())
    torch.manual_seed(9)
    assert torch.equal(split(data, 0.1, seed=3)[1].images, part.images)
    assert not torch.equal(split(data, 0.1, seed=4)[1].images, part.images)


@pytest.mark.parametrize("train, size", [(True, 60_000), (False, 10_000)])
def test_the_real_fashion_mnist_has_its_published_size_and_balance(train, size):
    if not (DATA / "FashionMNIST").is_dir():
        pytest.skip(f"no FashionMNIST in {DATA}; set LIGHTNING_CUSTOM_DATA")
    data = fashion_mnist(str(DATA), train=train)
    assert data.images.shape == (size, 1, 28, 28)
    assert data.labels.bincount().tolist() == [size // 10] * 10
    assert (data.images.min(), data.images.max()) == (-1, 1)
    # The mean and deviation of the training pixels that the literature standardises by.
    if train:
        pixels = (data.images + 1) / 2
        assert pixels.double().mean().item() == pytest.approx(0.2860, abs=1e-4)
        assert pixels.double().std().item() == pytest.approx(0.3530, abs=1e-4)
