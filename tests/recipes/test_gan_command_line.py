"""``python -m recipes.gan`` as a user meets it: what it leaves, how it goes on, what it refuses."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_custom.checkpoint import load_module
from lightning_custom.config import INVOCATION_FIELDS, stored_fields
from lightning_custom.metrics import read_rows
from lightning_custom.storage import saved_steps
from lightning_custom.testing import single_process
from recipes import gan
from tests.recipes.program import ROOT, finish, start

SMALL = (
    *("--accelerator", "cpu", "--width", 8, "--batch_size", 8, "--latent_size", 4),
    *("--log_every", 5, "--validate_every", 6, "--checkpoint_every", 4),
)
DATA = Path(os.environ.get("LIGHTNING_CUSTOM_DATA", ROOT.parent / "shared" / "data"))

needs_fashion_mnist = pytest.mark.skipif(
    not (DATA / "FashionMNIST" / "raw").is_dir(), reason=f"Fashion-MNIST is not in {DATA} (set LIGHTNING_CUSTOM_DATA)"
)

# Python imports a module of this name by itself at start.
NO_NETWORK = """
import pathlib
import socket
pathlib.Path(__file__).with_name("loaded").touch()
def refuse(*_):
    raise AssertionError("the program reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def as_yaml(config):
    """The stored fields as YAML gives them back, without tuples."""
    return yaml.safe_load(yaml.safe_dump(stored_fields(config)))


@pytest.fixture
def program(monkeypatch, capsys):
    """``program(*words) -> (status, printed, errors)``: the recipe's file as ``__main__``, without a new process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gan", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / "recipes" / "gan.py"), run_name="__main__")
        return leaving.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory, output and errors of a run of 12 steps in a process of its own that cannot reach a network."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    flags = (*SMALL, "--steps", 12, "--run_dir", folder / "run")
    status, printed, errors = finish(start("gan", *flags, environment={"PYTHONPATH": str(folder)}))
    assert status == 0, errors
    assert (folder / "loaded").exists()
    return folder / "run", printed, errors


def test_a_run_leaves_the_directory_that_the_documentation_describes(finished):
    run_dir, _, _ = finished
    names = {path.name for path in run_dir.iterdir()}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == {"config.yaml", "metrics.jsonl", "status.json", "checkpoints", ".lock", events}
    assert [(row["step"], "val/fid" in row) for row in read_rows(run_dir)] == [
        (5, False), (6, True), (10, False), (12, False), (12, True)
    ]  # fmt: skip
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["signal"], status["recipe"]) == ("complete", 12, None, "gan")
    assert status["command"] == f"python -m recipes.gan --run_dir {run_dir}"
    checkpoints = run_dir / "checkpoints"
    assert set(saved_steps(checkpoints)) >= {8, 12}
    best = json.loads((checkpoints / "best.json").read_text())
    assert best["val/fid"] == min(row["val/fid"] for row in read_rows(run_dir) if "val/fid" in row)


def test_the_stored_config_is_the_runs_own_without_what_belongs_to_one_start(finished):
    run_dir, _, _ = finished
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert not stored.keys() & INVOCATION_FIELDS
    asked = gan.GANConfig(
        accelerator="cpu", width=8, batch_size=8, latent_size=4, log_every=5, validate_every=6, checkpoint_every=4,
        steps=12,
    )  # fmt: skip
    assert stored == as_yaml(asked)


def test_a_run_shows_its_curves_pictures_and_settings_in_tensorboard(finished):
    run_dir, _, _ = finished
    events = EventAccumulator(str(run_dir)).Reload()
    curves = {"loss/generator", "loss/discriminator", "loss/penalty", "val/fid", "val/kid"}
    assert curves <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [6, 12]
    assert len(events.PluginTagToContent("hparams")) == 2  # what there is to set, and what this run has set


def test_off_a_terminal_a_run_prints_a_line_a_row_and_a_summary(finished):
    run_dir, printed, errors = finished
    rows, summary = printed.split("\n\n")
    assert [line.split("  ")[0] for line in rows.splitlines()] == [f"step {step}/12" for step in (5, 6, 10, 12, 12)]
    assert [line.split()[0] for line in summary.splitlines()] == [
        "FID", "KID", "classes", summary.splitlines()[3].split()[0], "run:", "look:", "draw:"
    ]  # fmt: skip
    assert f"tensorboard --logdir {run_dir}" in summary
    assert "\r" not in printed + errors


def test_the_same_command_again_ends_at_once_and_changes_nothing(finished, program):
    run_dir, _, _ = finished
    kept = [run_dir / "metrics.jsonl", *run_dir.glob("checkpoints/*/*.pt")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept[1:]], kept[0].read_text()
    status, printed, _ = program(*SMALL, "--steps", 12, "--run_dir", run_dir)
    assert status == 0
    assert printed == f"run: {run_dir} was complete already, at step 12; a larger --steps goes on\n"
    assert ([(path.read_bytes(), path.stat().st_mtime_ns) for path in kept[1:]], kept[0].read_text()) == before


def test_a_run_whose_last_checkpoint_is_damaged_is_not_called_complete(finished, program, tmp_path):
    shutil.copytree(finished[0], tmp_path / "damaged")
    newest = max((tmp_path / "damaged" / "checkpoints").glob("step-*"))
    (newest / "state.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="checkpoint step-00000012 is not usable"):
        status, printed, errors = program(*SMALL, "--steps", 12, "--run_dir", tmp_path / "damaged")
    assert status == 0, errors
    assert "complete already" not in printed
    assert "FID" in printed


def test_a_complete_run_goes_on_to_a_larger_number_of_steps(finished, program, tmp_path):
    shutil.copytree(finished[0], tmp_path / "longer")
    status, printed, errors = program(*SMALL, "--steps", 15, "--run_dir", tmp_path / "longer")
    assert status == 0, errors
    assert printed.startswith("goes on from step 12\nstep 15/15")
    assert [row["step"] for row in read_rows(tmp_path / "longer")] == [5, 6, 10, 12, 12, 15, 15]


def test_a_run_stopped_by_sigterm_leaves_with_143_and_the_same_command_goes_on(tmp_path, program):
    flags = (*SMALL, "--steps", 20_000, "--run_dir", tmp_path)
    process = start("gan", *flags)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM, errors
    stopped = json.loads((tmp_path / "status.json").read_text())
    assert (stopped["state"], stopped["signal"]) == ("stopped", signal.SIGTERM)
    assert stopped["step"] == saved_steps(tmp_path / "checkpoints")[-1]

    # A larger step to stop at stands in for the rest of the run.
    last = stopped["step"] + 3
    status, _, errors = program(*flags, "--stop_at", last)
    assert status == 0, errors
    assert saved_steps(tmp_path / "checkpoints")[-1] == last
    steps = [row["step"] for row in read_rows(tmp_path) if "loss/generator" in row]
    assert steps == list(range(5, last + 1, 5))


def wait_for_checkpoint(process, run_dir):
    deadline = time.monotonic() + 120
    while not saved_steps(run_dir / "checkpoints"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.distributed
def test_sigterm_to_the_group_of_two_processes_leaves_one_checkpoint_and_no_process(tmp_path):
    process = start("gan", *SMALL, "--steps", 20_000, "--devices", 2, "--run_dir", tmp_path, start_new_session=True)
    wait_for_checkpoint(process, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM, errors
    stopped = json.loads((tmp_path / "status.json").read_text())
    assert (stopped["state"], stopped["signal"]) == ("stopped", signal.SIGTERM)
    assert saved_steps(tmp_path / "checkpoints")[-1] == stopped["step"]
    deadline = time.monotonic() + 15
    while members := running_in_group(process.pid):
        assert time.monotonic() < deadline, members
        time.sleep(0.1)


def running_in_group(group):
    """The processes of a group but for those that have ended and wait to be collected."""
    listing = subprocess.run(["ps", "-eo", "pgid=,pid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=3) for line in listing.splitlines()]
    return [row for row in rows if row[0] == str(group) and not row[2].startswith("Z")]


def test_sample_draws_the_averages_samples_a_column_a_class(finished, program, tmp_path):
    run_dir, _, _ = finished
    out = tmp_path / "grid.png"
    status, printed, errors = program("sample", "--run_dir", run_dir, "--count", 25, "--out", out, "--which", "last")
    assert (status, printed, errors) == (0, f"25 samples: {out}\n", "")
    pixels = np.asarray(Image.open(out))
    # Ten classes, three rows, 8x8 pixels eight times as large, a line of one pixel around each.
    assert pixels.shape == (3 * 65 + 1, 10 * 65 + 1)

    config = gan.GANConfig(width=8, latent_size=4)
    generator, _ = gan.networks(config, gan.load_data(config))
    generator.load_state_dict(load_module(run_dir, "average", which="last"))
    latents = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = (generator(latents, torch.arange(25) % 10) + 1) * 127.5
    shown = [pixels[65 * (i // 10) + 1 :: 8, 65 * (i % 10) + 1 :: 8][:8, :8] for i in range(25)]
    np.testing.assert_allclose(np.stack(shown), images[:, 0].clamp(0, 255), atol=0.51)


def test_sample_writes_an_array_of_one_classs_truncated_samples(finished, program, tmp_path):
    words = ("--count", 3, "--label", 4, "--psi", 0, "--which", "last", "--weights", "generator")
    status, _, errors = program("sample", "--run_dir", finished[0], *words, "--out", tmp_path / "samples.npz")
    assert (status, errors) == (0, "")
    config = gan.GANConfig(width=8, latent_size=4)
    generator, _ = gan.networks(config, gan.load_data(config))
    generator.load_state_dict(load_module(finished[0], "generator", which="last"))
    with torch.no_grad():
        expected = (generator(torch.zeros(3, 4), torch.tensor([4, 4, 4])) + 1) * 127.5
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["labels"].tolist() == [4, 4, 4]
        np.testing.assert_allclose(samples["images"][..., 0], expected[:, 0].clamp(0, 255), atol=0.51)


def refused(result):
    """The one line that a program which refuses prints, after status 2."""
    status, printed, errors = result
    assert (status, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "words, named",
    [
        (("--run_dir", "nowhere"), "run_dir: nowhere holds no run"),
        (("--run_dir", "RUN", "--count", 0), "count: 0"),
        (("--run_dir", "RUN", "--count", "many"), "count"),
        (("--run_dir", "RUN", "--which", "worst"), "which"),
        (("--run_dir", "RUN", "--out", "nowhere/grid.png"), "out: cannot write nowhere/grid.png"),
        (("--run_dir", "RUN", "--out", "grid.gif"), "out: grid.gif does not end in .png or .npy or .npz"),
        (("--run_dir", "RUN", "--label", 10), "label: 10; the run has 10 classes"),
        (("--run_dir", "RUN", "--psi", -1), "psi: -1.0"),
        (("--run_dir", "RUN", "--colour", "red"), "--colour"),
        (("--count", 3), "run_dir"),
    ],
)
def test_sample_refuses_in_one_line(words, named, finished, program):
    words = [finished[0] if word == "RUN" else word for word in words]
    assert named in refused(program("sample", *words))


@pytest.mark.parametrize(
    "words, named",
    [
        (("--steps", "few"), "steps"),
        (("--batch_size", 0), "batch_size: 0"),
        (("--d_steps", 0), "d_steps: 0"),
        (("--d_betas", "[0, 1]"), "d_betas: (0.0, 1.0)"),
        (("--g_lr", -1), "g_lr: -1.0"),
        (("--loss", "wgan"), "nonsaturating"),
        (("--num_classes", 7), "num_classes: 7; digits has 10"),
        (("--preset", "mnist"), "preset: 'mnist' is unknown; there are digits, fashion-mnist"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("draw",), "'draw' is not a verb; there are: sample"),
        (("--colour", "red"), "--colour"),
        (("--strategy", "ddp"), "strategy"),
        (("--data", "fashion-mnist"), "data_root: none"),
        (("--data", "fashion-mnist", "--data_root", "nowhere"), "nowhere/FashionMNIST/raw"),
    ],
)
def test_a_wrong_start_is_refused_in_one_line(words, named, program, tmp_path, monkeypatch):
    # As on a machine without torchvision, which would try to download.
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.chdir(tmp_path)
    assert named in refused(program(*words))


def printed_config(program, *words):
    status, printed, errors = program(*words, "--print_config")
    assert (status, errors) == (0, "")
    return yaml.safe_load(printed)


def test_print_config_prints_the_preset_and_what_flags_change(program):
    defaults = printed_config(program)
    assert as_yaml(gan.GANConfig()).items() <= defaults.items()
    fashion = printed_config(program, "--preset", "fashion-mnist", "--width", 7)
    assert fashion == {**defaults, **gan.PRESETS["fashion-mnist"], "width": 7}


def test_a_printed_config_is_read_back_by_config(program, tmp_path):
    changed = printed_config(program, "--loss", "hinge", "--d_betas", "[0.5, 0.9]")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changed))
    assert printed_config(program, "--config", tmp_path / "mine.yaml") == changed


@needs_fashion_mnist
def test_three_steps_on_fashion_mnist_train_both_networks(tmp_path):
    config = gan.GANConfig(
        **{**gan.PRESETS["fashion-mnist"], "width": 4, "steps": 3, "log_every": 1, "validate_every": 0, "threads": 1},
        data_root=str(DATA), accelerator="cpu", batch_size=16, run_dir=str(tmp_path),
    )  # fmt: skip
    data = gan.load_data(config)
    assert data.images.shape == (60_000, 1, 28, 28)
    assert data.images.aminmax() == (-1, 1)
    generator, discriminator = gan.networks(config, data)
    before = [parameter.detach().clone() for parameter in (*generator.parameters(), *discriminator.parameters())]
    gan.train(single_process(), config, generator=generator, discriminator=discriminator, dataset=data.dataset())
    after = [*generator.parameters(), *discriminator.parameters()]
    assert all((one != other).any() for one, other in zip(before, after, strict=True))
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
@needs_fashion_mnist
def test_the_fashion_mnist_preset_starts_from_the_command_line(tmp_path):
    flags = ("--preset", "fashion-mnist", "--data_root", DATA, "--steps", 3, "--accelerator", "cpu")
    status, printed, errors = finish(start("gan", *flags, "--run_dir", tmp_path))
    assert status == 0, errors
    assert "run: " in printed
    row = read_rows(tmp_path)[-1]
    assert row["step"] == 3
    # Nearly untrained samples are far from real halves of the data, which are close to each other.
    assert row["val/fid"] > 20 * row["val/fid_floor"] > 0
