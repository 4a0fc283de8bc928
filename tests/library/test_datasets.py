import gzip
import os
import struct
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lightning_custom.datasets import (
    OMNIGLOT_FILE,
    Images,
    _torchvision,
    digits,
    fashion_mnist,
    load_images,
    mnist,
    omniglot,
    overlaid,
    split,
    split_characters,
)
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


CHARACTERS = [
    (False, "Greek", "character01"),
    (False, "Greek", "character02"),
    (False, "Latin", "character01"),
    (True, "Atlantean", "character01"),
]
"""Sorted within the background and within the evaluation set, as no file system need list them."""


def drawing(number):
    """105x105 in black and white: a bar whose place is the drawing's number, and a frame's corner."""
    pixels = np.full((105, 105), 255, np.uint8)
    pixels[10:40, 5 * number : 5 * number + 12] = 0
    return Image.fromarray(pixels).convert("1")


class FakeOmniglot:
    """What this project uses of torchvision's data set: where it put the images that it downloaded."""

    downloads = 0

    def __init__(self, root, background=True, download=False):
        assert download
        FakeOmniglot.downloads += 1
        self.target_folder = str(
            Path(root) / "omniglot-py" / ("images_background" if background else "images_evaluation")
        )
        for number, (evaluation, alphabet, character) in reversed(list(enumerate(CHARACTERS))):
            folder = Path(self.target_folder) / alphabet / character
            if evaluation != background:
                folder.mkdir(parents=True)
                for drawer in (2, 0, 1):
                    drawing(3 * number + drawer).save(folder / f"{number:04d}_{drawer:02d}.png")


@pytest.fixture
def fake_torchvision(monkeypatch):
    package = types.ModuleType("torchvision")
    package.datasets = types.SimpleNamespace(Omniglot=FakeOmniglot)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setattr(FakeOmniglot, "downloads", 0)


@pytest.mark.usefixtures("fake_torchvision")
def test_omniglot_is_fetched_once_reduced_and_kept_in_one_file(tmp_path):
    characters = omniglot(str(tmp_path))
    assert FakeOmniglot.downloads == 2
    assert characters.images.shape == (4, 3, 28, 28)
    assert characters.evaluation.tolist() == [evaluation for evaluation, _, _ in CHARACTERS]
    names = zip(characters.alphabet, characters.character, strict=True)
    assert list(names) == [(alphabet, character) for _, alphabet, character in CHARACTERS]
    for number, image in enumerate(characters.images.flatten(0, 1)):
        small = np.asarray(drawing(number).convert("L").resize((28, 28), Image.Resampling.LANCZOS))
        assert torch.equal(image, torch.from_numpy(255 - small))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["omniglot-28x28.npz", "omniglot-py"]
    again = omniglot(str(tmp_path))
    assert FakeOmniglot.downloads == 2
    assert torch.equal(again.images, characters.images)


def test_processes_that_start_at_once_download_one_after_another(tmp_path, monkeypatch):
    inside, most = [], []

    class Slow:
        def __init__(self, root, download, train):
            inside.append(threading.get_ident())
            time.sleep(0.05)
            most.append(len(inside))
            inside.remove(threading.get_ident())

    package = types.ModuleType("torchvision")
    package.datasets = types.SimpleNamespace(MNIST=Slow)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _torchvision("MNIST", str(tmp_path), True, "fetch it"), range(4)))
    assert most == [1, 1, 1, 1]


@pytest.mark.usefixtures("fake_torchvision")
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(ConfigError, match=r"data_root: .*npz could not be written \(No space left on device\); give"):
        omniglot(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["omniglot-py"]


def test_strokes_are_bright_on_a_dark_background(tmp_path):
    images = np.full((2, 20, 28, 28), 255, np.uint8)
    images[0, 0, 3, 4] = 0
    np.savez(
        tmp_path / OMNIGLOT_FILE, images=images, evaluation=[False, True], alphabet=["a", "b"], character=["c", "d"]
    )
    characters = omniglot(str(tmp_path))
    assert characters.images.nonzero().tolist() == [[0, 0, 3, 4]]
    assert characters.images.max() == 255
    assert characters.images.dtype == torch.uint8
    assert (characters.alphabet, characters.character) == (("a", "b"), ("c", "d"))


def test_omniglot_that_is_nowhere_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ConfigError, match=rf"data_root: {tmp_path} does not hold Omniglot; put {OMNIGLOT_FILE} into it"
    ):
        omniglot(str(tmp_path))
    with pytest.raises(ConfigError, match="data_root: none, but data omniglot needs one; give --data_root DIR"):
        omniglot(None)


@pytest.mark.parametrize("damage", ["empty", "cut", "another key", "not an archive"])
def test_a_damaged_omniglot_file_is_named_with_the_remedy(tmp_path, damage):
    path = tmp_path / OMNIGLOT_FILE
    np.savez_compressed(path, images=np.arange(10_000))
    content = {
        "empty": b"",
        "cut": path.read_bytes()[:-40],
        "another key": path.read_bytes(),
        "not an archive": b"no" * 9,
    }
    path.write_bytes(content[damage])
    with pytest.raises(ConfigError, match=rf"data_root: {path} is damaged .*delete it and fetch it again"):
        omniglot(str(tmp_path))


def test_characters_are_split_as_in_the_paper_by_the_seed_alone():
    numbers = torch.arange(1623)
    parts = split_characters(numbers, 3)
    assert [len(part) for part in parts] == [1100, 100, 423]
    assert sorted(torch.cat(parts).tolist()) == numbers.tolist()
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(split_characters(numbers, 3), parts, strict=True))
    assert not torch.equal(split_characters(numbers, 4)[2], parts[2])
    assert 600 < parts[2].double().mean() < 1000  # over all characters, not the last ones
    with pytest.raises(ConfigError, match="images: 1200 characters; 1,200 are taken to train and validate"):
        split_characters(numbers[:1200], 3)


def test_the_real_omniglot_has_its_published_size():
    if not (DATA / OMNIGLOT_FILE).exists():
        pytest.skip(f"no {OMNIGLOT_FILE} in {DATA}; set LIGHTNING_CUSTOM_DATA")
    characters = omniglot(str(DATA))
    assert (characters.images.shape, characters.images.dtype) == ((1623, 20, 28, 28), torch.uint8)
    assert characters.evaluation.tolist() == [False] * 964 + [True] * 659
    assert len(set(characters.alphabet)) == 50
    assert len(set(characters.alphabet[:964])) == 30
    assert len(set(zip(characters.alphabet, characters.character, strict=True))) == 1623
    assert (characters.images > 127).flatten(2).any(2).all()  # every drawing has a stroke
    assert 0.05 < (characters.images > 127).float().mean() < 0.12


def numbered(count, size=3):
    """Images whose pixels are all their own number, and labels that are it."""
    numbers = torch.arange(count)
    images = (numbers / count).view(-1, 1, 1, 1).expand(-1, 1, size, size).clone()
    return Images(images, numbers, count)


def test_overlaid_images_lie_in_their_corners_and_the_lighter_pixel_counts():
    data = overlaid(numbered(6), 5)
    left, right = (data.labels[:, i].view(-1, 1, 1) / 6 for i in (0, 1))
    image = data.images[:, 0]
    assert data.images.shape == (6, 1, 5, 5)
    assert (data.num_classes, data.labels.shape) == (6, (6, 2))
    assert torch.equal(image[:, :3, :2], left.expand(-1, 3, 2))
    assert torch.equal(image[:, 3:, 2:], right.expand(-1, 2, 3))
    assert torch.equal(image[:, 2, 2], torch.maximum(left, right)[:, 0, 0])
    assert (image[:, :2, 3:] == -1).all()
    assert (image[:, 3:, :2] == -1).all()


@pytest.mark.parametrize("count", [0, 4, 6, 15])
def test_overlaid_images_are_on_either_side_equally_often(count):
    labels = overlaid(numbered(6), 5, count=count).labels
    for side in labels.unbind(1):
        times = side.bincount(minlength=6)
        assert times.sum() == count
        assert times.max() - times.min() <= 1
    assert count < 6 or not torch.equal(labels[:, 0], labels[:, 1])


def test_overlaid_pairs_depend_on_their_seed_alone():
    torch.manual_seed(1)
    one = overlaid(digits(), 12, count=3000, seed=4)
    torch.manual_seed(2)
    again, other = (overlaid(digits(), 12, count=3000, seed=seed) for seed in (4, 5))
    assert torch.equal(one.images, again.images)
    assert torch.equal(one.labels, again.labels)
    assert not torch.equal(one.labels, other.labels)
    assert len({tuple(image) for image in one.images.flatten(1).tolist()}) > 2990
    assert torch.unique(one.labels, dim=0).shape == (100, 2)


def test_overlaid_parts_of_a_split_share_no_image():
    parts = split(numbered(20), 0.3, seed=1)
    used = [set(overlaid(part, 5, count=200).labels.flatten().tolist()) for part in parts]
    assert [len(part) for part in used] == [14, 6]
    assert not used[0] & used[1]


def test_overlaid_images_can_be_told_apart():
    """The corners, far enough apart, still show each image: its nearest digit is itself."""
    data = digits()
    pairs = overlaid(data, 16, count=200)
    for i, part in enumerate((pairs.images[:, :, :8, :8], pairs.images[:, :, 8:, 8:])):
        distances = torch.cdist(part.flatten(1), data.images.flatten(1))
        assert torch.equal(data.labels[distances.argmin(1)], pairs.labels[:, i])


def test_a_canvas_smaller_than_the_images_is_refused():
    with pytest.raises(ConfigError, match="size: 7; the images are 8x8, give at least 8"):
        overlaid(digits(), 7)


@pytest.fixture
def cifar_root(tmp_path):
    """CIFAR-10's binary version, two images a file; the first pixel of image k has the colours k, 10 + k, 20 + k."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        rows = np.zeros((2, 3073), np.uint8)
        for row, place in enumerate((2 * number, 2 * number + 1)):
            rows[row, [0, 1, 1025, 2049]] = place % 10, place, 10 + place, 20 + place
        (folder / name).write_bytes(rows.tobytes())
    return tmp_path


def test_cifar10_is_read_without_torchvision(cifar_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    train, test = (load_images("cifar10", str(cifar_root), train=part) for part in (True, False))
    assert (train.images.shape, test.images.shape) == ((10, 3, 32, 32), (2, 3, 32, 32))
    assert (train.labels.tolist(), test.labels.tolist()) == (list(range(10)), [0, 1])
    colours = torch.stack([torch.arange(10), 10 + torch.arange(10), 20 + torch.arange(10)], dim=1)
    torch.testing.assert_close(train.images[:, :, 0, 0], colours / 127.5 - 1)
    assert (train.images[:, :, 0, 1:] == -1).all()


def test_a_damaged_or_missing_cifar10_is_named_with_the_remedy(cifar_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    path = cifar_root / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"data_root: {path} is damaged .*delete it and fetch it again"):
        load_images("cifar10", str(cifar_root))
    with pytest.raises(ConfigError, match="put its binary version into nowhere/cifar-10-batches-bin, or pip install"):
        load_images("cifar10", "nowhere")
