"""``recipes.gan`` on every kind of image data, and what it says of the samples."""

import math
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_custom import generation, image_data
from lightning_custom.datasets import Images, digits
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.sampling import SampleConfig
from lightning_custom.testing import single_process
from recipes import gan

SMALL = gan.GANConfig(
    steps=4, log_every=2, validate_every=4, checkpoint_every=0, batch_size=8, latent_size=4, width=8, accelerator="cpu"
)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 64 images each, in colour."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(64):
            pixels = draw.integers(100 * label, 100 * label + 100, (11, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def on_folder(folder, tmp_path, **fields):
    fields = {"data": "folder", "data_root": str(folder), "image_size": 8, "num_classes": 2, "steps": 2, **fields}
    return replace(SMALL, run_dir=str(tmp_path / "run"), **fields)


def test_a_folder_is_learned_with_its_subfolders_for_classes(folder, tmp_path, capsys):
    run_dir = gan.main(on_folder(folder, tmp_path))
    row = read_rows(run_dir)[-1]
    assert row["step"] == 2
    assert {"val/fid", "val/recall", "val/density", "val/confident_as_asked"} <= row.keys()
    assert "classes " in capsys.readouterr().out


def test_a_folder_without_subfolders_has_scores_but_none_of_classes(folder, tmp_path, capsys):
    run_dir = gan.main(on_folder(folder / "cats", tmp_path, num_classes=0))
    row = read_rows(run_dir)[-1]
    assert math.isfinite(row["val/fid"])
    assert not [tag for tag in row if "class" in tag or "modes" in tag]
    assert "classes" not in capsys.readouterr().out


def test_a_number_of_classes_that_the_folder_has_not_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="num_classes: 10; folder has 2, or use 0 for none"):
        gan.main(on_folder(folder, tmp_path, num_classes=10))


def test_sample_needs_no_training_data(folder, tmp_path):
    run_dir = gan.main(on_folder(folder, tmp_path, network="conv"))
    shutil.rmtree(folder)
    gan.sample(SampleConfig(run_dir=run_dir, out=str(tmp_path / "samples.npy"), count=3))
    assert np.load(tmp_path / "samples.npy").shape == (3, 8, 8, 3)


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    path = folder / "cats" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ConfigError, match=rf"data_root: {path} is not a readable image"):
        gan.main(on_folder(folder, tmp_path))


def test_stacked_images_are_learned_and_their_modes_counted(tmp_path, monkeypatch):
    images, labels, _ = digits()
    often = Images(images.repeat(6, 1, 1, 1), labels.repeat(6), 10)  # enough for a stack of every mode
    monkeypatch.setattr(image_data, "load_images", lambda name, root: often)
    monkeypatch.setattr(generation, "_MOST_SAMPLES", 1000)
    run_dir = gan.main(replace(SMALL, data="stacked-mnist", num_classes=0, run_dir=str(tmp_path)))
    row = read_rows(run_dir)[-1]
    assert 1 <= row["val/modes"] <= 50  # of 500 samples of a generator that knows nothing yet
    assert row["val/reverse_kl"] > 3


def test_the_cifar10_preset_trains_both_networks_on_images_of_its_shape(tmp_path):
    shell = {"steps": 2, "log_every": 1, "validate_every": 0, "checkpoint_every": 0, "run_dir": str(tmp_path)}
    small = {"width": 8, "batch_size": 4, "threads": 1, "accelerator": "cpu"}
    config = gan.GANConfig(**{**gan.PRESETS["cifar10"], **shell, **small})
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = Images(images, torch.arange(12) % 10, 10)
    networks = gan.networks(config, data)
    before = [parameter.detach().clone() for network in networks for parameter in network.parameters()]
    gan.train(single_process(), config, generator=networks[0], discriminator=networks[1], dataset=data.dataset())
    after = [parameter for network in networks for parameter in network.parameters()]
    assert all(parameter.isfinite().all() for parameter in after)
    assert sum(bool((one != other).any()) for one, other in zip(before, after, strict=True)) > 0.9 * len(before)
    assert [row["ada/p"] for row in read_rows(tmp_path) if "ada/p" in row] == pytest.approx([0.3, 0.3])


def train_on_digits(config, scores=None):
    data = digits()
    data = Images(data.images[:24], data.labels[:24], 10)
    generator, discriminator = gan.networks(config, data)
    return gan.train(
        single_process(),
        config,
        generator=generator,
        discriminator=discriminator,
        dataset=data.dataset(),
        scores=scores,
    )


def test_logits_are_shown_as_distributions_with_their_means_in_the_rows(tmp_path):
    train_on_digits(replace(SMALL, run_dir=str(tmp_path)))
    rows = [row for row in read_rows(tmp_path) if "logit/real" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 <= row["logit/told_apart"] <= 1 for row in rows)
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    for tag in ("logit/real", "logit/fake"):
        found = events.Histograms(tag)
        assert [event.step for event in found] == [2, 4]
        for event, row in zip(found, rows, strict=True):
            assert event.histogram_value.num == 8
            assert event.histogram_value.sum / 8 == pytest.approx(row[tag], abs=1e-5)


def test_a_collapse_is_told_once_the_data_has_been_seen(tmp_path):
    def alike(sample):
        return {"val/fid": 1.0, "val/spread": 0.01}

    # Two of three batches of the pass, then four.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on_digits(replace(SMALL, steps=2, run_dir=str(tmp_path / "early")), alike)
    with pytest.warns(UserWarning, match=r"step 4: mode collapse: samples vary 1.0% as much .* To try: "):
        train_on_digits(replace(SMALL, run_dir=str(tmp_path / "late")), alike)
