"""Diffusion: what the denoiser is given and asked for in a step, own networks and data, strategies, the verb."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import TensorDataset

from lightning_custom import denoisers
from lightning_custom.checkpoint import load_module
from lightning_custom.cli import command_line
from lightning_custom.diffusion import Diffusion, even_times, one_of_each_pair, signal
from lightning_custom.errors import ConfigError
from lightning_custom.loop import seed_step
from lightning_custom.metrics import read_rows
from lightning_custom.testing import first_difference, largest_difference, single_process
from recipes import diffusion as recipe
from tests.recipes.program import finish, start

CONFIG = recipe.DiffusionConfig(
    steps=1, log_every=1, validate_every=0, checkpoint_every=0, batch_size=8, num_classes=3, warmup_steps=0,
    schedule="constant", bound=0.0, accelerator="cpu",
)  # fmt: skip
CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])


def points(count=300):
    """A point near the centre of each label, in turn."""
    labels = torch.arange(count) % 3
    noise = 0.2 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(CENTRES[labels] + noise, labels)


class Witness(nn.Module):
    """Predicts ``weight`` times the noisy sample, and keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, noisy, times, labels, estimates):
        self.calls.append((torch.is_grad_enabled(), noisy, times, labels, estimates))
        return self.weight * noisy


def one_step(folder, **fields):
    """The calls of a step's denoiser, the samples and what is drawn for them, and the loss."""
    config, witness, fabric = replace(CONFIG, run_dir=str(folder), **fields), Witness(), single_process()
    state = recipe.train(fabric, config, denoiser=witness, dataset=points())
    draw = seed_step(config.seed, 0, fabric).shared
    times, noise = even_times(8, draw), torch.randn(8, 2, generator=draw)
    unlabelled, half = torch.rand(8, generator=draw) < config.label_dropout, one_of_each_pair(8, draw)
    state.batches.position = 0
    samples, labels = next(state.batches)
    drawn = samples, labels, times, noise, unlabelled, half
    return witness.calls, drawn, read_rows(folder)[0]["loss/denoising"]


def test_half_of_the_samples_get_the_estimate_that_the_denoiser_makes_of_them_without_a_gradient(tmp_path):
    (first, second), (samples, _, times, noise, _, half), _ = one_step(tmp_path)
    process = Diffusion("cosine", CONFIG.prediction)
    noisy = process.noisy(samples, noise, times)
    assert half.sum() == 4
    assert not first[0]
    torch.testing.assert_close(first[1], noisy[half])
    assert torch.equal(first[4], torch.zeros(4, 2))
    assert second[0]
    torch.testing.assert_close(second[1], noisy)
    torch.testing.assert_close(second[2], times.float())
    estimates = process.estimate(0.5 * noisy, noisy, times)
    torch.testing.assert_close(second[4], torch.where(half[:, None], estimates, 0.0))
    assert not second[4].requires_grad
    assert estimates[half].abs().min() > 0


def test_without_self_conditioning_the_denoiser_is_called_once_and_given_nothing(tmp_path):
    (only,), _, _ = one_step(tmp_path, self_conditioning=False)
    assert only[0]
    assert only[4] is None


@pytest.mark.parametrize("dropout", (0.0, 0.5, 1.0))
def test_labels_are_dropped_by_chance_in_both_calls(dropout, tmp_path):
    (first, second), (_, labels, _, _, unlabelled, half), _ = one_step(tmp_path, label_dropout=dropout, guidance=0.0)
    expected = torch.where(unlabelled, 3, labels)
    assert torch.equal(second[3], expected)
    assert torch.equal(first[3], expected[half])
    assert (expected == 3).sum() in {0.0: [0], 0.5: range(1, 8), 1.0: [8]}[dropout]


@pytest.mark.parametrize("min_snr", (0.0, 5.0))
@pytest.mark.parametrize("prediction", ("v", "epsilon", "sample"))
def test_the_loss_is_the_weighted_error_of_the_prediction(prediction, min_snr, tmp_path):
    _, (samples, _, times, noise, _, _), loss = one_step(
        tmp_path, prediction=prediction, min_snr=min_snr, noise_schedule="linear"
    )
    power = signal("linear", times)[:, None]
    alpha, sigma, snr = power.sqrt(), (1 - power).sqrt(), power / (1 - power)
    noisy = alpha * samples + sigma * noise
    target = {"v": alpha * noise - sigma * samples, "epsilon": noise, "sample": samples}[prediction]
    scale = {"v": snr + 1, "epsilon": snr, "sample": 1}[prediction]
    weights = snr.clamp_max(min_snr) / scale if min_snr else 1.0
    assert loss == pytest.approx(float((weights * (0.5 * noisy - target).square()).mean()), rel=1e-5)


# Own networks and data


class Denoiser(nn.Module):
    """Of points ``[B, 2]``, or of whatever has as many numbers."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.conditions = denoisers.Conditions(num_classes, 32)
        self.layers = nn.Sequential(nn.Linear(4 + 32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, noisy, times, labels, estimates):
        inputs = torch.cat([noisy.flatten(1), estimates.flatten(1), self.conditions(times, labels)], dim=1)
        return self.layers(inputs).view_as(noisy)


LONGER = replace(
    CONFIG, steps=400, log_every=400, batch_size=64, lr=3e-3, schedule="cosine", ema_half_life=3000.0, sample_steps=20,
    guidance=0.0, prediction="v", min_snr=0.0,
)  # fmt: skip


def trained(config, dataset):
    torch.manual_seed(0)
    denoiser = Denoiser(config.num_classes)
    return recipe.train(single_process(), config, denoiser=denoiser, dataset=dataset).average.module


def generated(config, denoiser, labels, shape=(2,)):
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(1))
    return recipe.sampler(single_process(), config, denoiser)(noise, labels)


# What is estimated from noise must be bounded; the error of the sample alone says little of fine detail.
@pytest.mark.parametrize(
    "fields", [{"prediction": "epsilon", "bound": 3.0}, {"prediction": "sample", "min_snr": 50.0}, {}]
)
def test_generated_points_of_each_label_have_the_mean_and_spread_of_the_labels_data(fields, tmp_path):
    config, labels = replace(LONGER, **fields, run_dir=str(tmp_path)), torch.arange(3).repeat_interleave(300)
    denoiser = trained(config, points())
    for centre, cloud in zip(CENTRES, generated(config, denoiser, labels).split(300), strict=True):
        torch.testing.assert_close(cloud.mean(0), centre, atol=0.15, rtol=0)
        assert 0.1 < float(cloud.std(0).mean()) < 0.4  # 0.2
    if not fields:
        guided = generated(replace(config, guidance=2.0), denoiser, labels)
        assert float(guided[:300].std(0).mean()) < 0.9 * float(generated(config, denoiser, labels)[:300].std(0).mean())


def test_samples_of_any_shape_without_labels_have_the_mean_and_spread_of_the_data(tmp_path):
    config = replace(LONGER, num_classes=0, run_dir=str(tmp_path))
    data = points().tensors[0].view(300, 1, 2, 1)
    denoiser, shape = trained(config, TensorDataset(data)), (1, 2, 1)
    cloud = generated(config, denoiser, torch.zeros(600, dtype=torch.long), shape)
    assert cloud.shape == (600, *shape)
    torch.testing.assert_close(cloud.mean(0), data.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(cloud.std(0), data.std(0), atol=0.2, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="num_classes: 3, but the dataset has no labels"):
        recipe.train(single_process(), config, denoiser=Witness(), dataset=TensorDataset(torch.zeros(9, 2)))
    with pytest.raises(ConfigError, match="batch_size: 8 over 1 processes, but the dataset yields batches of 5"):
        recipe.train(
            single_process(), config, denoiser=Witness(), dataset=[[torch.zeros(5, 2), torch.zeros(5)]].__iter__()
        )


def test_samples_beyond_the_bound_are_refused_since_estimates_are_cut_there(tmp_path):
    samples = torch.zeros(9, 2)
    samples[5, 1] = -8.2
    config = replace(CONFIG, num_classes=0, bound=3.0, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"bound: 3.0, but samples go from -8.2 to 0; scale them, or set bound"):
        recipe.train(single_process(), config, denoiser=Witness(), dataset=TensorDataset(samples))
    batches = iter([(samples, torch.zeros(9))])
    config = replace(config, batch_size=9, run_dir=str(tmp_path / "batches"))
    with pytest.raises(ConfigError, match=r"bound: 3.0, but samples go from -8.2 to 0"):
        recipe.train(single_process(), config, denoiser=Witness(), dataset=batches)
    recipe.require_within(8.2 + 1e-6, TensorDataset(samples))
    recipe.require_within(0.0, TensorDataset(samples))


def test_labels_that_are_counted_from_one_are_refused_since_the_last_would_mean_none(tmp_path):
    samples, labels = points().tensors
    config = replace(CONFIG, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="num_classes: 3, but labels go from 1 to 3; count them from 0"):
        recipe.train(single_process(), config, denoiser=Witness(), dataset=TensorDataset(samples, labels + 1))
    recipe.require_labels(0, [(sample, "a caption") for sample in samples])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"eta": 1.5}, "eta: 1.5; it must be at most 1"),
        ({"label_dropout": 2.0}, "label_dropout: 2.0; it must be at most 1"),
        ({"sample_steps": 0}, "sample_steps: 0"),
        ({"val_images": 6}, "val_images: 6; it must be at least 8"),
        ({"network": "unet", "width": 12}, "width: 12; the unet normalises groups"),
        ({"min_snr": -1.0}, "min_snr: -1.0"),
        ({"prediction": "epsilon", "bound": 0.0}, "bound: 0.0, but an estimate by epsilon"),
        ({"label_dropout": 0.0, "guidance": 1.0}, "guidance: 1.0, but the denoiser never works without a label"),
    ],
)
def test_a_wrong_setting_is_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        recipe.DiffusionConfig(**fields)


# Strategies and compilation

SMALL = (
    *("--accelerator", "cpu", "--width", 8, "--depth", 1, "--batch_size", 8, "--sample_steps", 2, "--steps", 6),
    *("--validate_every", 3, "--log_every", 3, "--checkpoint_every", 3),
)


@pytest.mark.distributed
def test_two_processes_under_ddp_give_the_run_of_one(tmp_path):
    for name, flags in (("one", ()), ("two", ("--devices", 2, "--strategy", "ddp"))):
        words = (*SMALL, "--precision", "64-true", *flags, "--run_dir", tmp_path / name)
        status, _, errors = finish(start("diffusion", *words))
        assert status == 0, errors
    one, two = (load_module(tmp_path / name, "average", which="last") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-9
    assert first_difference(one, load_module(tmp_path / "one", "denoiser", which="last")) is not None


@pytest.mark.distributed
def test_fsdp_is_refused_in_one_line(tmp_path):
    flags = ("--devices", 2, "--strategy", "fsdp", "--run_dir", tmp_path)
    status, _, errors = finish(start("diffusion", *SMALL, *flags))
    assert status == 2
    assert "error: strategy: fsdp leaves no process with the weights to average; use ddp, or auto" in errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_a_compiled_run_is_the_eager_one_and_is_compiled(tmp_path):
    dataset, found = recipe.load_data(recipe.DiffusionConfig()).dataset(), []
    for compiled in (False, True):
        counters.clear()
        config = recipe.DiffusionConfig(
            steps=4, batch_size=8, width=8, depth=1, compile=compiled, precision="64-true",
            run_dir=str(tmp_path / str(compiled)),
        )  # fmt: skip
        state = recipe.train(
            single_process("64-true"), config, denoiser=recipe.network(config, (1, 8, 8)), dataset=dataset
        )
        found.append(state.denoiser.state_dict())
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert largest_difference(*map(dict, found)) <= 1e-9


# The command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of six steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    config = recipe.DiffusionConfig(
        steps=6, width=8, depth=1, batch_size=8, sample_steps=2, validate_every=3, checkpoint_every=3, log_every=3,
        val_images=200, accelerator="cpu", run_dir=str(run_dir),
    )  # fmt: skip
    recipe.main(config)
    return run_dir


def test_a_run_leaves_its_scores_and_pictures(finished, capsys):
    assert json.loads((finished / "status.json").read_text())["state"] == "complete"
    scores = [row for row in read_rows(finished) if "val/fid" in row]
    assert [row["step"] for row in scores] == [3, 6]
    assert {"val/fid_floor", "val/kid", "val/coverage", "val/confident_as_asked", "val/classes"} <= scores[0].keys()
    recipe.main(recipe.DiffusionConfig(**{**vars(config_of(finished)), "run_dir": str(finished)}))
    assert "was complete already, at step 6" in capsys.readouterr().out


def config_of(run_dir):
    return recipe.config_of_run(recipe.DiffusionConfig, str(run_dir))


def drawn(finished, *words):
    verbs = {"sample": (recipe.SampleConfig, recipe.sample)}
    words = ["sample", "--run_dir", str(finished), *map(str, words)]
    return command_line(recipe.DiffusionConfig, recipe.main, presets=recipe.PRESETS, verbs=verbs, arguments=words)


def test_sample_draws_what_the_average_makes_of_noise(finished, tmp_path):
    out = tmp_path / "samples.npz"
    assert drawn(finished, "--out", out, "--count", 12, "--guidance", 0, "--which", "last", "--seed", 5) == 0
    config = replace(config_of(finished), guidance=0.0)
    denoiser = recipe.network(config, (1, 8, 8))
    denoiser.load_state_dict(load_module(finished, "average", which="last"))
    noise = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(12) % 10
    *_, (expected, _) = recipe.denoising(config, denoiser, noise, labels, lambda: noise)
    with np.load(out) as samples:
        assert samples["labels"].tolist() == labels.tolist()
        np.testing.assert_allclose(samples["images"][..., 0], (expected[:, 0] + 1).clamp(0, 2) * 127.5, atol=0.51)


def test_sample_draws_a_column_a_class_and_a_row_for_each_way(finished, tmp_path):
    sizes = {}
    for name, words in {
        "classes": ("--count", 20),
        "one": ("--count", 4, "--label", 3),
        "way": ("--count", 3, "--show", "estimates", "--sample_steps", 5, "--eta", 1),
    }.items():
        assert drawn(finished, "--out", tmp_path / f"{name}.png", *words) == 0
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes[name] = picture.size
    assert sizes == {"classes": (651, 131), "one": (131, 131), "way": (326, 196)}


def test_sample_needs_no_training_data(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (10 * i, 0, 255)).save(images / f"{i}.png")
    config = recipe.DiffusionConfig(
        steps=2, network="unet", width=8, batch_size=4, sample_steps=2, validate_every=0, checkpoint_every=0,
        num_classes=0, data="folder", data_root=str(images), image_size=16, accelerator="cpu", run_dir=str(tmp_path),
    )  # fmt: skip
    data = recipe.load_data(config)
    denoiser = recipe.network(config, data.images.shape[1:])
    recipe.train(single_process(), config, denoiser=denoiser, dataset=data.dataset())
    shutil.rmtree(images)
    assert drawn(tmp_path, "--out", tmp_path / "samples.npy", "--count", 3) == 0
    assert np.load(tmp_path / "samples.npy").shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    "words, named",
    [
        (("--count", 0), "count: 0"),
        (("--label", 10), "label: 10; the run has 10 classes"),
        (("--out", "grid.gif"), "out: grid.gif does not end in"),
        (("--eta", 2), "eta: 2.0"),
        (("--show", "nothing"), "show"),
        (("--run_dir", "nowhere"), "run_dir: nowhere holds no run"),
    ],
)
def test_sample_refuses_in_one_line(words, named, finished, capsys):
    assert drawn(finished, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
