"""The classification recipe: data of every kind, scores, schedules, early stopping, failures, and its launchers."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, get_worker_info
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_custom.checkpoint import load_module, read_best
from lightning_custom.cli import command_line
from lightning_custom.config import with_run_dir
from lightning_custom.data import GlobalOrder
from lightning_custom.datasets import digits
from lightning_custom.errors import ConfigError
from lightning_custom.launch import launch
from lightning_custom.metrics import STEPS_PER_SECOND, read_rows
from lightning_custom.networks import ConvClassifier
from lightning_custom.precision import unwrap
from lightning_custom.storage import read_tensors, saved_steps, step_folder
from lightning_custom.testing import (
    assert_resumes_exactly,
    assert_rows_equal,
    first_difference,
    in_processes,
    largest_difference,
    single_process,
)
from recipes import classification
from recipes.classification import PRESETS, ClassificationConfig
from tests.recipes.cases import run_classification
from tests.recipes.program import ROOT

SMALL = ClassificationConfig(
    steps=12, log_every=4, validate_every=6, checkpoint_every=5, batch_size=8, width=8, accelerator="cpu"
)


def part(start, stop):
    images, labels, _ = digits()
    return TensorDataset(images[start:stop], labels[start:stop])


def train(fabric, config, *, train_data, val_data=None, **options):
    torch.manual_seed(config.seed)
    model = options.pop("model", None) or ConvClassifier(1, 8, 10, config.width)
    val_data = part(1700, 1743) if val_data is None else val_data
    return classification.train(
        fabric, config, model=model, train_data=train_data, val_data=val_data, num_classes=10, **options
    )


def status_of(run_dir):
    return json.loads((Path(run_dir) / "status.json").read_text())


def state_of(run_dir, step):
    return read_tensors(step_folder(Path(run_dir) / "checkpoints", step) / "state.pt")


# Data


class Noisy:
    """A map-style dataset whose samples are changed at random, by three generators."""

    def __len__(self):
        return 43

    def __getitem__(self, index):
        image, label = part(0, 43)[index]
        return image + 0.1 * torch.rand(()) + float(np.random.rand()) + random.random(), label


class InWorkers(Noisy):
    def __getitem__(self, index):
        assert get_worker_info() is not None
        return super().__getitem__(index)


class Plain:
    """Batches that end after 5, always the same."""

    def __iter__(self):
        for i in range(5):
            yield list(part(8 * i, 8 * i + 8)[:])


class Stateful:
    """Batches that can be asked for, and put back to, their place."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield list(part(8 * (self.position % 5), 8 * (self.position % 5) + 8)[:])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


class Endless:
    """A generator's batches that never end and are drawn at random."""

    def __iter__(self):
        while True:
            chosen = torch.randint(0, 100, (8,))
            yield list(part(0, 100)[chosen])


class Stream:
    """Samples out of shards, read in turn, of which each process has its own, as webdataset splits them."""

    def __init__(self, rank, processes, batch_size):
        self.shards, self.batch_size = range(rank, 6, processes), batch_size

    def __iter__(self):
        samples = part(0, 60)
        for shard in self.shards:
            for start in range(10 * shard, 10 * shard + 8, self.batch_size):
                yield list(samples[start : start + self.batch_size])


def run_on(make, fabric, config):
    return train(fabric, config, train_data=make())


@pytest.mark.slow
def test_a_run_of_2_workers_and_random_augmentation_resumes_exactly_inside_a_pass(tmp_path):
    config = dataclasses.replace(SMALL, num_workers=2)
    assert_resumes_exactly(partial(run_on, InWorkers), config, stop_at=7, folder=tmp_path / "workers")
    # Nor does augmentation depend on workers.
    alone = run_on(Noisy, single_process(), dataclasses.replace(SMALL, run_dir=str(tmp_path / "alone")))
    assert first_difference(state_of(tmp_path / "workers" / "straight", 12), state_of(alone_dir(alone), 12)) is None
    assert_rows_equal(tmp_path / "workers" / "straight", tmp_path / "alone")


def alone_dir(state):
    return state.metrics._folder


def test_an_iterable_with_a_state_resumes_exactly(tmp_path):
    assert_resumes_exactly(partial(run_on, Stateful), SMALL, stop_at=7, folder=tmp_path)


@pytest.mark.parametrize("make", [Plain, Endless, partial(Stream, 0, 1, 8)], ids=["ends", "endless", "stream"])
def test_an_iterable_without_a_state_resumes_exactly_and_says_that_it_is_read_forward(make, tmp_path):
    with pytest.warns(UserWarning, match=r"has no state_dict; reading 7 batches forward"):
        assert_resumes_exactly(partial(run_on, make), SMALL, stop_at=7, folder=tmp_path)


def stream_on_two(fabric, folder):
    """A run on the process's own shards, straight and stopped, with the labels that it saw."""
    seen = []

    def loss(logits, labels):
        if torch.is_grad_enabled():
            seen.append(labels.tolist())
        return cross_entropy(logits, labels)

    found = {}
    for name, stops in {"straight": [None], "stopped": [7, None]}.items():
        for stop in stops:
            config = dataclasses.replace(SMALL, run_dir=f"{folder}/{name}", stop_at=stop)
            data = Stream(fabric.global_rank, fabric.world_size, 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if stops != [None] else "error")
                state = train(fabric, config, train_data=data, loss=loss)
        found[name] = {"model": dict(unwrap(state.model).state_dict()), "position": state.batches.position}
    return {"found": found, "labels": seen[:12]}


@pytest.mark.distributed
def test_a_stream_split_by_rank_resumes_exactly_on_two_processes(tmp_path):
    first, second = in_processes(stream_on_two, 2, str(tmp_path))
    assert first_difference(first["found"]["straight"], first["found"]["stopped"]) is None
    assert first_difference(first["found"], second["found"]) is None
    assert_rows_equal(tmp_path / "straight", tmp_path / "stopped")
    _, labels, _ = digits()
    for rank, found in enumerate((first, second)):
        expected = [labels[i : i + 4].tolist() for shard in range(rank, 6, 2) for i in (10 * shard, 10 * shard + 4)]
        assert found["labels"] == (expected * 2)[:12]


# Scores


def expected_scores(labels, logits, prefix):
    predictions = logits.argmax(1)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, average="macro", zero_division=0
    )
    of_each = sklearn.metrics.recall_score(labels, predictions, average=None, labels=range(10))
    return {
        f"{prefix}loss": sklearn.metrics.log_loss(labels, logits.double().softmax(1), labels=range(10)),
        f"{prefix}accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        f"{prefix}precision": precision,
        f"{prefix}recall": recall,
        f"{prefix}f1": f1,
        **{f"{prefix}class_accuracy/{k}": value for k, value in enumerate(of_each)},
    }


def scored_run(fabric, folder):
    """A run whose weights never change, on batches and a validation set that two processes cannot halve evenly."""
    config = dataclasses.replace(
        SMALL, steps=41, log_every=41, batch_size=6, shift=0, lr=0.0, weight_decay=0.0, run_dir=folder, validate_every=0
    )
    metrics = MetricCollection({"top2": MulticlassAccuracy(10, top_k=2, average="micro")})
    state = train(fabric, config, train_data=part(0, 100), val_data=part(100, 1303), val_metrics=metrics)
    return unwrap(state.model).state_dict()


def check_scores(folder, weights):
    model = ConvClassifier(1, 8, 10, SMALL.width)
    model.load_state_dict(weights)
    order = GlobalOrder(100, 6, SMALL.seed)
    seen = torch.cat([order.index(k) for k in range(41)])
    expected = {}
    top2 = None
    for prefix, (images, labels) in {"train/": part(0, 100)[seen], "val/": part(100, 1303)[:]}.items():
        with torch.no_grad():
            logits = model(images)
        expected |= expected_scores(labels, logits, prefix)
        top2 = sklearn.metrics.top_k_accuracy_score(labels, logits, k=2, labels=range(10))
    row, validation = read_rows(folder)
    found = {tag: value for tag, value in {**row, **validation}.items() if tag not in ("step", "lr", STEPS_PER_SECOND)}
    assert found == pytest.approx({**expected, "val/top2": top2}, rel=1e-5)


def test_scores_equal_scikit_learns_on_all_predictions(tmp_path):
    check_scores(tmp_path, scored_run(single_process(), str(tmp_path)))


@pytest.mark.distributed
def test_scores_of_two_processes_equal_scikit_learns_on_all_predictions(tmp_path):
    first, second = in_processes(scored_run, 2, str(tmp_path))
    assert first_difference(first, second) is None
    check_scores(tmp_path, first)


class Forgetful(nn.Module):
    """Dropout, running statistics, and a part that its owner keeps in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(16).eval()
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.frozen(self.trunk(images)))


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_a_validation_is_without_dropout_and_leaves_modes_and_statistics(average, tmp_path):
    config = dataclasses.replace(SMALL, steps=4, log_every=0, average=average, run_dir=str(tmp_path), validate_every=2)
    modes = []

    def loss(logits, labels):
        modes.append([module.training for module in model.modules()])
        return cross_entropy(logits, labels)

    model = Forgetful()
    expected = [module.training for module in model.modules()]
    state = train(single_process(), config, train_data=part(0, 100), model=model, loss=loss)
    judged = model if average == "none" else state.average.module
    before = {name: value.clone() for name, value in judged.state_dict().items()}
    scores = [classification.evaluate(single_process(), state, part(100, 200), loss, "val/")[0] for _ in range(2)]
    assert scores[0] == scores[1]
    assert first_difference(before, dict(judged.state_dict())) is None
    assert not before["frozen.num_batches_tracked"]
    training = [mode for mode in modes if mode == expected]
    assert len(training) == (4 if average == "none" else len(modes))
    assert [module.training for module in model.modules()] == expected


def test_the_average_is_the_model_until_its_start_and_then_the_mean_of_its_weights(tmp_path):
    config = dataclasses.replace(SMALL, average="swa", average_start=3, log_every=0)
    weights, averages = [], []
    for step in range(1, 7):
        state = run_classification(single_process(), dataclasses.replace(config, run_dir=str(tmp_path), stop_at=step))
        weights.append(unwrap(state.model).head.weight.detach().clone())
        averages.append(state.average.module.head.weight.detach().clone())
    for step in range(4):
        assert torch.equal(averages[step], weights[step])
    for step in (4, 5):
        torch.testing.assert_close(averages[step], torch.stack(weights[3 : step + 1]).mean(0))


@pytest.mark.parametrize(
    "best, mode, choose",
    [("val/loss", "min", min), ("val/class_accuracy/3", "max", max), ("val/accuracy", "auto", max)],
)
def test_the_best_checkpoint_is_that_of_the_named_score(best, mode, choose, tmp_path):
    config = dataclasses.replace(SMALL, steps=16, validate_every=2, schedule="constant", lr=0.1, keep=1)
    config = dataclasses.replace(config, best=best, best_mode=mode, run_dir=str(tmp_path))
    train(single_process(), config, train_data=part(0, 100))
    found = {row["step"]: row[best] for row in read_rows(tmp_path) if best in row}
    value = choose(found.values())
    step = min(step for step, score in found.items() if score == value)
    assert step < 16, "a case in which the last is not the best"
    assert read_best(tmp_path) == {"step": step, "folder": f"step-{step:08d}", best: value}
    assert saved_steps(tmp_path / "checkpoints") == [step, 16]


def test_a_best_that_is_no_score_is_refused_with_those_that_are(tmp_path):
    config = dataclasses.replace(SMALL, best="val/acuracy", best_mode="max", run_dir=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"best: 'val/acuracy' is not a score; there are val/loss, val/accuracy, val/"
    ):
        train(single_process(), config, train_data=part(0, 100))


def test_a_run_out_of_patience_is_complete_and_returns_at_once_when_started_again(tmp_path):
    # The loss falls from validation to validation, so the first is the largest.
    config = dataclasses.replace(
        SMALL, steps=40, validate_every=4, patience=3, best="val/loss", best_mode="max", run_dir=str(tmp_path)
    )
    state = train(single_process(), config, train_data=part(0, 100))
    losses = [row["val/loss"] for row in read_rows(tmp_path) if "val/loss" in row]
    assert losses[0] == max(losses)
    assert (state.step, len(losses)) == (16, 4)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("complete", 16)
    assert saved_steps(tmp_path / "checkpoints")[-1] == 16
    rows = read_rows(tmp_path)

    def never(logits, labels):
        raise AssertionError("a step was done")

    again = train(single_process(), config, train_data=part(0, 100), loss=never)
    assert (again.step, status_of(tmp_path)["state"]) == (16, "complete")
    assert read_rows(tmp_path) == rows


def program(*words):
    """The recipe's command line in this process: its status."""
    small = ("--accelerator", "cpu", "--width", "8", "--log_every", "1")
    return command_line(
        ClassificationConfig, classification.main, presets=PRESETS, arguments=[*small, *map(str, words)]
    )


def test_a_finished_run_whose_schedule_reads_its_length_does_not_promise_more_steps(tmp_path, capsys):
    flags = ("--width", 8, "--accelerator", "cpu", "--run_dir", tmp_path)
    assert program(*flags, "--steps", 4) == 0
    capsys.readouterr()
    assert program(*flags) == 0
    ends = "its schedule ends there, so a longer run needs another --run_dir"
    assert capsys.readouterr().out == f"run: {tmp_path} was complete already, at step 4; {ends}\n"
    assert program(*flags, "--steps", 8) == 2
    assert "steps (4 -> 8)" in last_line(capsys)


def test_the_printed_test_accuracy_is_of_the_best_checkpoint(tmp_path, capsys):
    flags = ("--steps", 12, "--validate_every", 4, "--lr", 0.05, "--schedule", "constant", "--run_dir", tmp_path)
    assert program(*flags, "--best", "val/accuracy", "--best_mode", "max") == 0
    _, _, test = classification.load_data(ClassificationConfig())
    accuracies = {}
    for which in ("best", "last"):
        model = ConvClassifier(1, 8, 10, 8)
        model.load_state_dict(load_module(tmp_path, "model", which=which))
        with torch.no_grad():
            accuracies[which] = sklearn.metrics.accuracy_score(test.labels, model(test.images).argmax(1))
    assert accuracies["best"] != accuracies["last"]
    printed = capsys.readouterr().out
    assert f"test accuracy {accuracies['best']:.2%}" in printed
    (row,) = (row for row in read_rows(tmp_path) if "test/accuracy" in row)
    assert (row["step"], row["test/accuracy"]) == (12, pytest.approx(accuracies["best"], abs=1e-7))
    assert f"best checkpoint by val/accuracy: {read_best(tmp_path)['val/accuracy']:.4f}" in printed
    # A start with nothing left to do tests nothing again.
    assert program(*flags, "--best", "val/accuracy", "--best_mode", "max") == 0
    printed = capsys.readouterr().out
    assert printed == f"run: {tmp_path} was complete already, at step 12; a larger --steps goes on\n"
    # One that was killed in its test does it now.
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True) if "test/" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert program(*flags, "--best", "val/accuracy", "--best_mode", "max") == 0
    assert f"test accuracy {accuracies['best']:.2%}" in capsys.readouterr().out


# Schedules


def learning_rates(run_dir):
    return [row["lr"] for row in read_rows(run_dir) if "lr" in row]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_run_with_decay_steps_can_be_extended(schedule, tmp_path):
    config = dataclasses.replace(SMALL, schedule=schedule, warmup_steps=2, decay_steps=10, log_every=1)
    straight = dataclasses.replace(config, steps=14, run_dir=str(tmp_path / "straight"))
    train(single_process(), straight, train_data=part(0, 100))
    for steps in (8, 14):
        extended = dataclasses.replace(config, steps=steps, run_dir=str(tmp_path / "extended"), validate_every=0)
        train(single_process(), extended, train_data=part(0, 100))
    states = [state_of(tmp_path / name, 14) for name in ("straight", "extended")]
    weights = [{key: value for key, value in state.items() if key.startswith("model.")} for state in states]
    assert first_difference(*weights) is None
    rates = learning_rates(tmp_path / "extended")
    assert rates == learning_rates(tmp_path / "straight")
    assert rates[0] == 0.0
    assert rates[10:] == [rates[-1]] * 4
    assert rates[-1] < 0.05 * max(rates)


def test_without_decay_steps_a_schedule_fixes_steps_and_a_constant_rate_does_not(tmp_path):
    for schedule in ("cosine", "constant"):
        config = dataclasses.replace(SMALL, steps=4, schedule=schedule, run_dir=str(tmp_path / schedule))
        train(single_process(), config, train_data=part(0, 100))
        longer = dataclasses.replace(config, steps=6)
        if schedule == "constant":
            assert train(single_process(), longer, train_data=part(0, 100)).step == 6
        else:
            with pytest.raises(ConfigError, match=r"another config: steps \(4 -> 6\)"):
                train(single_process(), longer, train_data=part(0, 100))


@pytest.mark.parametrize("field", ["batch_size", "accumulate", "decay_steps"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: 0; it must be at least 1"):
        ClassificationConfig(**{field: 0})


def test_an_average_in_half_precision_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, average="ema", run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="average: bf16-true rounds"):
        train(single_process("bf16-true"), config, train_data=part(0, 100))


# What is not finite


def assert_every_checkpoint_is_finite(run_dir):
    for step in saved_steps(run_dir / "checkpoints"):
        state = state_of(run_dir, step)
        assert all(value.isfinite().all() for key, value in state.items() if key.startswith("model."))


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}], ids=["plain", "as ddp leaves it"])
def test_a_step_too_long_ends_the_run_with_one_line_and_no_poisoned_checkpoint(
    variables, tmp_path, capsys, monkeypatch
):
    """The first step's update makes the weights so large that the second's outputs are not finite."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = ("--steps", 20, "--checkpoint_every", 1, "--warmup_steps", 5, "--schedule", "constant")
    assert program(*flags, "--stop_at", 3, "--lr", 1e30, "--run_dir", tmp_path) == 1
    assert re.fullmatch(
        r"error: step 3: train/loss is nan; the output of model\.trunk\.\d \(\w+\) is the first that is not finite; "
        rf"last good checkpoint: {tmp_path}/checkpoints/step-00000002",
        last_line(capsys),
    )
    assert saved_steps(tmp_path / "checkpoints")[-1] == 2
    assert_every_checkpoint_is_finite(tmp_path)
    assert status_of(tmp_path)["state"] == "failed"
    assert "train/loss is nan" in status_of(tmp_path)["error"]


def run_with_a_bad_sample(config):
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    images, labels = part(0, 100)[:]
    images = images.clone()
    images[BAD] = float("nan")
    train(fabric, config, train_data=TensorDataset(images, labels))
    return str(config.run_dir)


BAD = 37


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_sample_that_is_not_finite_ends_the_run_at_its_own_step(log_every, tmp_path, capsys):
    order = GlobalOrder(100, 8, seed=0)
    step = 1 + next(k for k in range(100) if BAD in order.index(k).tolist())
    assert step > 3
    words = [
        "--accelerator",
        "cpu",
        "--width",
        "8",
        "--batch_size",
        "8",
        "--steps",
        "40",
        "--log_every",
        str(log_every),
    ]
    words += ["--checkpoint_every", "3", "--validate_every", "0", "--run_dir", str(tmp_path)]
    assert command_line(ClassificationConfig, run_with_a_bad_sample, presets=PRESETS, arguments=words) == 1
    what = "train/loss is nan" if log_every == 1 else r"the weights of model\.trunk\.0\.weight are not finite"
    good = (step - 1) // 3 * 3
    assert re.fullmatch(
        rf"error: step {step}: {what}; the output of model\.trunk\.0 \(Conv2d\) is the first that is not finite; "
        rf"last good checkpoint: {tmp_path}/checkpoints/step-{good:08d}",
        last_line(capsys),
    )
    assert saved_steps(tmp_path / "checkpoints")[-1] == good
    assert_every_checkpoint_is_finite(tmp_path)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("step", [3, 7, 12])
def test_a_replayed_step_has_the_bits_of_the_runs_row_and_leaves_the_run_as_it_is(step, tmp_path, capsys):
    flags = ("--steps", 12, "--checkpoint_every", 6, "--validate_every", 6, "--run_dir", tmp_path)
    assert program(*flags) == 0
    before = contents(tmp_path)
    assert program("--run_dir", tmp_path, "--replay_step", step) == 0
    assert contents(tmp_path) == before
    (folder,) = re.findall(rf"^replayed step {step}: (.+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert Path(folder) != tmp_path

    def rows(run_dir):
        found = [row for row in read_rows(run_dir) if row["step"] == step]
        return [{tag: value for tag, value in row.items() if not tag.startswith("time/")} for row in found]

    assert rows(folder) == rows(tmp_path) != []


# Launchers and strategies. Each is a program of its own, so these have few steps. With half the width every channel
# would be a group of its own: the gradient of the bias before it would be rounding alone, and Adam's step its sign.

FLAGS = (
    *("--accelerator", "cpu", "--threads", "1", "--width", "16", "--steps", "8", "--batch_size", "16"),
    *("--log_every", "2", "--validate_every", "4", "--checkpoint_every", "0", "--sam", "0.05", "--clip_norm", "0.5"),
)
TORCHRUN = ("-m", "torch.distributed.run")


class Launched:
    """A command of Python in the checkout, with all that it starts; what it prints goes to a file."""

    def __init__(self, log, *words, environment=None):
        self.log = Path(log)
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, seconds=200):
        """The exit status and all that was printed."""
        try:
            status = self.process.wait(seconds)
        finally:
            self.end()
        return status, self.log.read_text()

    def end(self):
        # A launcher's workers have sessions of their own, and end when it is told to.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)


def launched(log, *words, **options):
    status, text = Launched(log, *words, **options).finish()
    assert status == 0, text
    return text


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run that every launcher and strategy must give."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert program(*FLAGS, "--run_dir", folder) == 0
    return folder


def assert_same_run(expected, actual):
    """Equal within rounding: parameters, the optimizer's state, and rows."""
    one, other = state_of(expected, 8), state_of(actual, 8)
    assert one.keys() == other.keys()
    assert largest_difference(one, other) <= 1e-5
    assert largest_difference(one["optimizer"]["state"], other["optimizer"]["state"]) <= 1e-5
    assert rows_of(actual) == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in rows_of(expected)]


def rows_of(run_dir):
    """The rows without what differs by nature; a class without samples has no accuracy."""
    return [
        {tag: -1 if value is None else value for tag, value in row.items() if tag != STEPS_PER_SECOND}
        for row in read_rows(run_dir)
    ]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


LAUNCHERS = {
    "devices": ("-m", "recipes.classification", "--devices", 2),
    "ddp": ("-m", "recipes.classification", "--devices", 2, "--strategy", "ddp"),
    "torchrun": (*TORCHRUN, "--standalone", "--nproc_per_node", 2, "-m", "recipes.classification"),
    "torchrun-fsdp": (
        *(*TORCHRUN, "--standalone", "--nproc_per_node", 2, "-m", "recipes.classification"),
        *("--strategy", "fsdp"),
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_give_the_run_of_one(name, one_process, tmp_path):
    text = launched(tmp_path / "log.txt", *LAUNCHERS[name], *FLAGS, "--run_dir", tmp_path / "run")
    assert "2 processes" in text
    assert text.count("test accuracy") == 1
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [(), ("--strategy", "ddp"), ("--strategy", "fsdp")], ids=["none", "ddp", "fsdp"])
def test_fabric_run_gives_the_run_of_one(strategy, one_process, tmp_path):
    fabric = ("-m", "lightning.fabric.cli", "--accelerator", "cpu", "--devices", 2, *strategy)
    fabric += ("--main-port", free_port(), "recipes/classification.py")
    launched(tmp_path / "log.txt", *fabric, *FLAGS, "--run_dir", tmp_path / "run")
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.distributed
def test_two_nodes_give_the_run_of_one(one_process, tmp_path):
    """Two launchers on this machine, one process each."""
    rendezvous = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port())
    nodes = [
        Launched(
            tmp_path / f"node-{rank}.txt",
            *(*TORCHRUN, *rendezvous, "--node_rank", rank, "-m", "recipes.classification"),
            *(*FLAGS, "--num_nodes", 2, "--run_dir", tmp_path / "run"),
        )
        for rank in range(2)
    ]
    try:
        found = [node.finish() for node in nodes]
    finally:
        for node in nodes:
            node.end()
    assert [status for status, _ in found] == [0, 0], found
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.distributed
def test_sharded_runs_resume_to_the_bit_and_on_one_process_and_the_other_way_round(one_process, tmp_path):
    sharded = ("-m", "recipes.classification", "--devices", 2, "--strategy", "fsdp", *FLAGS)
    log = tmp_path / "log.txt"
    launched(log, *sharded, "--run_dir", tmp_path / "straight")
    assert_same_run(one_process, tmp_path / "straight")

    launched(log, *sharded, "--run_dir", tmp_path / "stopped", "--stop_at", 3)
    assert saved_steps(tmp_path / "stopped" / "checkpoints") == [3]
    for path in (tmp_path / "stopped").rglob("*"):
        copy = tmp_path / "one" / path.relative_to(tmp_path / "stopped")
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    launched(log, *sharded, "--run_dir", tmp_path / "stopped")
    assert first_difference(state_of(tmp_path / "straight", 8), state_of(tmp_path / "stopped", 8)) is None
    assert_rows_equal(tmp_path / "straight", tmp_path / "stopped")

    with pytest.warns(UserWarning, match="processes: 2 -> 1"):
        assert program(*FLAGS, "--run_dir", tmp_path / "one", "--devices", 1, "--strategy", "auto") == 0
    assert_same_run(one_process, tmp_path / "one")

    assert program(*FLAGS, "--run_dir", tmp_path / "other", "--stop_at", 3) == 0
    text = launched(log, *sharded, "--run_dir", tmp_path / "other")
    assert "processes: 1 -> 2" in text
    assert_same_run(one_process, tmp_path / "other")


# What fails on one process


FAILING = """
import os, sys, time
from pathlib import Path
from recipes import classification
from recipes.classification import *

def loss(logits, targets):
    loss.calls += 1
    if os.environ.get("LOCAL_RANK") == "1" and loss.calls == int(os.environ["FAIL_AT"]):
        Path(os.environ["FAILED"]).write_text(str(time.time()))
        raise ZeroDivisionError("by design")
    return cross_entropy(logits, targets)

loss.calls = 0
given = classification.train
classification.train = lambda *arguments, **options: given(*arguments, **options, loss=loss)
sys.exit(command_line(ClassificationConfig, classification.main, presets=PRESETS))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher",
    [(), ("--strategy", "fsdp"), (*TORCHRUN, "--standalone", "--nproc_per_node", 2)],
    ids=["fabric", "fabric-fsdp", "torchrun"],
)
def test_a_process_that_fails_ends_all_soon_and_says_which_it_was(launcher, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    failed = tmp_path / "failed.txt"
    own = launcher[:1] != TORCHRUN[:1]
    words = (script, "--devices", 2, *launcher) if own else (*launcher, script)
    flags = ("--accelerator", "cpu", "--threads", 1, "--width", 8, "--steps", 100000, "--run_dir", tmp_path / "run")
    environment = {"FAIL_AT": "20", "FAILED": str(failed)}
    status, text = Launched(tmp_path / "log.txt", *words, *flags, environment=environment).finish()
    assert time.time() - float(failed.read_text()) < 15
    assert status != 0
    assert "process 1 failed: ZeroDivisionError: by design" in text
    assert processes_of(script) == []


def processes_of(script):
    """What still runs a script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(script) in path.read_text():
                found.append(path)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags, status, line",
    [
        (("--best", "nonsense", "--best_mode", "max"), 2, "error: best: 'nonsense' is not a score"),
        (("--lr", 1e30), 1, "error: step 2: train/loss is nan (--replay_step 2 names the module); last good"),
    ],
)
def test_an_error_of_all_processes_is_said_once_with_its_status(flags, status, line, tmp_path):
    words = ("-m", "recipes.classification", "--devices", 2, *FLAGS[:10], "--validate_every", 2, "--log_every", 1)
    found, text = Launched(tmp_path / "log.txt", *words, *flags, "--run_dir", tmp_path / "run").finish()
    assert found == status, text
    assert text.count("error: ") == 1
    assert line in text
