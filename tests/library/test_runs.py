import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_custom import __version__, runs
from lightning_custom.__main__ import main
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.config import RunConfig
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import MetricLogger
from lightning_custom.pictures import CURVE_COLOURS
from lightning_custom.run import Run
from lightning_custom.testing import single_process


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(RunConfig):
    steps: int = 4
    """Steps."""
    checkpoint_every: int = 1
    """Steps between two checkpoints."""
    keep: int = 9
    """Checkpoints."""
    scale: float = 0.5
    """What a step adds to the weights, and what the loss is multiplied with."""


@dataclass
class ScaleState:
    model: nn.Module
    average: nn.Module | None
    metrics: MetricLogger
    step: int = 0


def train(config, *, averaged=False, best="val/score", fail_at=None):
    """A run whose weights after step k are k times the scale, and whose best score is that of step 2."""
    fabric = single_process()
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    state = ScaleState(model, AveragedModel(model) if averaged else None, MetricLogger(fabric, config.run_dir))
    with Checkpointer(fabric, config, best=best) as checkpointer:
        checkpointer.restore(state)
        while state.step < config.steps:
            if state.step == fail_at:
                raise ZeroDivisionError("by design")
            state.step += 1
            for parameter in model.parameters():
                parameter.data += config.scale
            if state.average is not None:
                state.average.update_parameters(model)
            scores = {"val/score": abs(state.step - 2) + config.scale}
            state.metrics.record(state.step, {"loss/train": config.scale * state.step, **scores, "watch/norm/0": 1.0})
            if checkpointer.due(state.step):
                checkpointer.save(state, scores)
            if checkpointer.stop_requested:
                break
    return state


def rewrite_status(run_dir, **fields):
    path = Path(run_dir) / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs at several depths, one of each state; all of them written by the loop above."""
    folder = tmp_path_factory.mktemp("runs")
    train(ScaleConfig(run_dir=str(folder / "a" / "first")))
    train(ScaleConfig(run_dir=str(folder / "a" / "second"), stop_at=3, scale=0.25, seed=7))
    train(ScaleConfig(run_dir=str(folder / "b" / "deep" / "averaged")), averaged=True)
    with pytest.raises(ZeroDivisionError):
        train(ScaleConfig(run_dir=str(folder / "failed"), steps=9), best=None, fail_at=3)
    train(ScaleConfig(run_dir=str(folder / "killed"), stop_at=2))
    rewrite_status(folder / "killed", state="running")  # what kill -9 leaves
    (folder / "other").mkdir()
    (folder / "other" / "status.json").write_text('{"state": "of another program"}')
    return folder


def ask(capsys, *words):
    """(status, what is printed, what is printed of errors)."""
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def rows_of_table(text):
    return [line.split() for line in text.splitlines()]


def test_a_listing_has_every_run_with_what_it_says_of_itself(root, capsys):
    for run, age in zip(runs.find_runs(root), (5, 70, 7300, 200_000, 30), strict=True):
        for name in ("status.json", "metrics.jsonl"):
            os.utime(run.path / name, (time.time() - age - 0.5,) * 2)
    status, printed, _ = ask(capsys, "runs", root)
    assert status == 0
    assert rows_of_table(printed) == [
        ["run", "recipe", "step", "state", "best", "age"],
        [str(root / "a" / "first"), "test_runs", "4/4", "complete", "val/score", "0.5", "5s"],
        [str(root / "a" / "second"), "test_runs", "3/4", "stopped", "val/score", "0.25", "1m"],
        [str(root / "b" / "deep" / "averaged"), "test_runs", "4/4", "complete", "val/score", "0.5", "2h"],
        [str(root / "failed"), "test_runs", "3/9", "failed", "-", "-", "2d"],
        [str(root / "killed"), "test_runs", "2/4", "killed", "val/score", "0.5", "30s"],
    ]


def test_a_run_directory_lists_itself(root):
    assert [run.path for run in runs.find_runs(root / "a" / "first")] == [root / "a" / "first"]


def test_a_run_is_running_as_long_as_its_lock_is_held(tmp_path):
    config = ScaleConfig(run_dir=str(tmp_path / "run"))
    train(config)
    rewrite_status(tmp_path / "run", state="running", step=2)
    owner = Run(config)
    owner.open()
    held = runs.summarise(tmp_path / "run")
    owner.close()
    free = runs.summarise(tmp_path / "run")
    # A run goes on from its last checkpoint; while it runs it has come as far as its last row.
    assert [(run.state, run.step) for run in (held, free)] == [("running", 4), ("killed", 2)]


def test_asking_for_the_state_takes_no_lock_away(tmp_path):
    config = ScaleConfig(run_dir=str(tmp_path / "run"))
    train(config)
    rewrite_status(tmp_path / "run", state="running")
    runs.summarise(tmp_path / "run")
    owner = Run(config)
    owner.open()
    owner.close()


@pytest.mark.parametrize(
    "content, step",
    [
        ("", 0),
        ('{"step": 1}\n{"step": 5}\n', 5),
        ('{"step": 1}\n{"step": 5', 1),
        ('{"step"', 0),
        ('{"step": 1, "a": "' + 70_000 * "x" + '"}\n{"step": 3}\n', 3),
        ('{"step": 1, "a": "' + 70_000 * "x" + '"}\n', 0),
    ],
    ids=["empty", "whole rows", "half a row behind", "half a row", "a long row before", "a long row last"],
)
def test_the_last_whole_row_says_how_far_a_run_is(content, step, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert runs._last_step(tmp_path / "metrics.jsonl") == step


def test_a_listing_starts_without_torch(root):
    program = (
        "import sys\nfrom lightning_custom.__main__ import main\n"
        f"main(['runs', {str(root)!r}])\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    assert len(result.stdout.splitlines()) == 7


def test_a_comparison_has_the_settings_that_differ_and_the_last_values(root, capsys):
    status, printed, _ = ask(capsys, "compare", root / "a" / "first", root / "a" / "second")
    assert status == 0
    assert rows_of_table(printed) == [
        ["first", "second"],
        ["seed", "0", "7"],
        ["scale", "0.5", "0.25"],
        [],
        ["step", "4/4", "3/4"],
        ["state", "complete", "stopped"],
        ["best", "val/score", "0.5", "0.25"],
        ["loss/train", "2", "0.75"],
        ["val/score", "2.5", "1.25"],
    ]


def test_a_comparison_says_what_a_run_has_not(root, capsys):
    status, printed, _ = ask(capsys, "compare", root / "killed", root / "failed", root / "a" / "first")
    assert status == 0
    lines = rows_of_table(printed)
    assert lines[:2] == [["killed", "failed", "a/first"], ["steps", "4", "9", "4"]]
    assert ["best", "val/score", "0.5", "-", "0.5"] in lines
    alike = rows_of_table(ask(capsys, "compare", root / "killed", root / "a" / "first")[1])
    assert alike[1] == ["equal", "settings"]


def test_a_value_that_was_not_finite_is_no_number(tmp_path):
    MetricLogger(single_process(), tmp_path).record(1, {"a": math.nan, "b": 2.0})
    assert runs.last_values(tmp_path) == {"a": None, "b": 2.0}


def columns_of(png, number):
    """The columns in which a curve is, inside the axes."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)[26:297, 42:]
    return (abs(picture - np.array(CURVE_COLOURS[number])).max(2) < 60).any(0).nonzero()[0]


def test_a_plot_draws_each_run_over_its_own_steps(root, tmp_path, capsys):
    chosen = [root / "a" / "first", root / "a" / "second"]
    status, *_ = ask(capsys, "compare", *chosen, "--plot", tmp_path / "x.png", "--metric", "loss/train")
    assert status == 0
    first, second = (columns_of((tmp_path / "x.png").read_bytes(), number) for number in (0, 1))
    assert second[0] == pytest.approx(first[0], abs=2)
    # Steps 1 to 3 against 1 to 4.
    assert (second[-1] - second[0]) / (first[-1] - first[0]) == pytest.approx(2 / 3, abs=0.02)


def test_runs_with_other_steps_between_are_drawn_as_unbroken_lines(tmp_path):
    for level, (name, steps) in enumerate({"even": range(0, 11, 2), "odd": range(1, 11, 3)}.items()):
        logger = MetricLogger(single_process(), tmp_path / name)
        for step in steps:
            logger.record(step, {"x": float(level)})
    png = runs.curves([tmp_path / "even", tmp_path / "odd"], "x")
    for number, share in ((0, 1.0), (1, 0.9)):
        drawn = columns_of(png, number)
        assert len(drawn) == drawn[-1] - drawn[0] + 1 == pytest.approx(share * 428, abs=12)


def test_the_metric_of_a_plot_is_by_default_the_score_of_the_best(root):
    chosen = [root / "a" / "first", root / "a" / "second"]
    assert runs.curves(chosen, None) == runs.curves(chosen, "val/score") != runs.curves(chosen, "loss/train")


@pytest.mark.parametrize("which, step", [("best", 2), ("last", 4)])
def test_an_exported_file_holds_the_weights_and_the_config(root, tmp_path, capsys, which, step):
    run, out = root / "a" / "first", tmp_path / "new" / "model.safetensors"
    status, printed, _ = ask(capsys, "export", run, "--out", out, "--which", which)
    assert (status, printed) == (0, f"model of {run}: {out}\n")
    weights = load_file(out)
    assert {name: value.tolist() for name, value in weights.items()} == {
        "weight": [[0.5 * step, 0.5 * step]],
        "bias": [0.5 * step],
    }
    nn.Linear(2, 1).load_state_dict(weights)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["module"], metadata["step"], metadata["version"]) == ("model", str(step), __version__)
    config = json.loads(metadata["config"])
    assert (config["scale"], config["steps"], "run_dir" in config) == (0.5, 4, False)
    assert list(out.parent.iterdir()) == [out]


def test_an_average_is_exported_under_the_names_of_its_network(root, tmp_path, capsys):
    run = root / "b" / "deep" / "averaged"
    assert ask(capsys, "export", run, "--out", tmp_path / "x.safetensors")[0] == 0
    weights = load_file(tmp_path / "x.safetensors")
    stored = load_module(run, "average")
    assert weights.keys() == {"weight", "bias"}
    assert all(torch.equal(value, stored[f"module.{name}"]) for name, value in weights.items())
    ask(capsys, "export", run, "--out", tmp_path / "y.safetensors", "--module", "model")
    assert not torch.equal(load_file(tmp_path / "y.safetensors")["weight"], weights["weight"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("runs {root}/nowhere", "DIR: {root}/nowhere is not a directory"),
        ("compare {root}/a/first", "RUN: only {root}/a/first; give two runs or more"),
        ("compare {root}/a/first {root}/a", "RUN: {root}/a has no status.json of a run"),
        ("compare {root}/a/first {root}/other", "RUN: {root}/other has no status.json of a run"),
        ("compare {root}/a/first {root}/killed --metric x", "metric: is for a picture; give --plot"),
        (
            "compare {root}/a/first {root}/killed --plot {out}/x.png --metric x",
            "metric: 'x' is in no row of {root}/a/first; there are loss/train, val/score, watch/norm/0",
        ),
        (
            "compare {root}/a/first {root}/killed --plot {out}/x.png --metric val/scores",
            "metric: 'val/scores' is in no row of {root}/a/first; there are val/score\n",
        ),
        ("compare {root}/failed {root}/killed --plot {out}/x.png", "metric: none given, and {root}/failed keeps no"),
        ("compare {root}/a/first {root}/killed --plot {out}/no/x.png", "plot: cannot write {out}/no/x.png"),
        ("export {root}/a --out {out}/x", "run_dir: {root}/a holds no checkpoint"),
        (
            "export {root}/a/first --out {out}/x --module head",
            "has no 'head'; it has average, model, precision_plugin, step",
        ),
        ("export {root}/a/first", "the following arguments are required: --out"),
        ("export {root}/a/first --out {out}/x --which worst", "invalid choice: 'worst'"),
        ("list", "invalid choice: 'list'"),
        ("", "the following arguments are required: VERB"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(root, tmp_path, capsys, words, message):
    status, _, errors = ask(capsys, *words.format(root=root, out=tmp_path).split())
    assert status == 2
    assert errors.startswith("error: ")
    assert message.format(root=root, out=tmp_path) in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_no_network_is_refused(tmp_path, root):
    from lightning_custom.export import _plain_weights

    with pytest.raises(ConfigError, match="module: 'optimizer' is not a network"):
        _plain_weights("optimizer", {"state": {}, "param_groups": []})


def test_a_missing_safetensors_is_named(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    status, _, errors = ask(capsys, "export", root / "a" / "first", "--out", tmp_path / "x")
    assert status == 2
    assert errors == "error: export: needs safetensors, which is not installed; pip install safetensors\n"


def test_an_empty_directory_has_no_runs(tmp_path, capsys):
    assert ask(capsys, "runs", tmp_path) == (0, f"no runs under {tmp_path}\n", "")
