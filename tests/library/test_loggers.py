import csv
import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from lightning_custom import loggers
from lightning_custom.checkpoint import Checkpointer
from lightning_custom.config import RunConfig
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger, read_rows
from lightning_custom.testing import in_processes, single_process

FAKE = f"{__name__}.fake"
STARTED = []
"""The fake loggers, in the order in which they were made."""


@dataclass
class Fake:
    run_dir: object
    settings: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    ends: list = field(default_factory=list)

    def log_hyperparams(self, settings):
        self.settings.append(settings)

    def log_metrics(self, row, step):
        self.rows.append((step, row["loss"]))

    def finalize(self, status):
        self.ends.append(status)


def fake(run_dir):
    STARTED.append(Fake(run_dir))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def started():
    STARTED.clear()
    return STARTED


@dataclass
class State:
    model: nn.Module
    metrics: MetricLogger
    step: int = 0


def train(fabric, config, *, fails_at=None):
    """A loop that learns nothing; the loss of a step is the step."""
    state = State(nn.Linear(1, 1), MetricLogger(fabric, config.run_dir, hyperparameters=config))
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
        while state.step < config.steps:
            state.step += 1
            if state.step == fails_at:
                raise RuntimeError("as asked")
            state.metrics.update({"loss": torch.tensor(float(state.step))})
            state.metrics.flush(state.step)
            if checkpointer.due(state.step):
                checkpointer.save(state)
            if checkpointer.stop_requested:
                break
    return state


@pytest.fixture
def config(tmp_path):
    return RunConfig(steps=4, checkpoint_every=2, logger=FAKE, run_dir=str(tmp_path / "run"))


def test_a_logger_by_name_gets_the_settings_once_every_row_and_the_end(config, started):
    train(single_process(), config)
    (logger,) = started
    assert [settings["steps"] for settings in logger.settings] == [4]
    assert logger.rows == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert logger.ends == ["success"]
    assert str(logger.run_dir) == config.run_dir


def test_a_resumed_run_gives_its_logger_the_rows_from_the_restored_step_on(config, started):
    with pytest.raises(RuntimeError, match="as asked"):
        train(single_process(), config, fails_at=4)
    train(single_process(), config)
    first, second = started
    assert (first.rows[-1], first.ends) == ((3, 3.0), ["failed"])
    assert (second.rows, second.ends) == ([(3, 3.0), (4, 4.0)], ["success"])
    assert second.settings == []


def test_a_complete_run_that_is_started_again_starts_nothing_in_its_logger(config, started):
    train(single_process(), config)
    train(single_process(), config)
    assert (started[1].rows, started[1].settings, started[1].ends) == ([], [], [])


def test_a_replay_is_not_logged(config, started):
    train(single_process(), config)
    train(single_process(), replace(config, replay_step=3, resume="auto"))
    assert len(started) == 1


def test_without_a_name_there_is_none(config, started):
    train(single_process(), replace(config, logger=None))
    assert started == []


def test_fabrics_csv_logger_holds_the_rows_of_the_run(config, tmp_path):
    train(single_process(), replace(config, logger="csv", stop_at=3))
    train(single_process(), replace(config, logger="csv"))
    rows = read_rows(tmp_path / "run")
    found = []
    for version in ("version_0", "version_1"):
        with (tmp_path / "run" / "csv" / version / "metrics.csv").open() as file:
            found += [
                (int(row["step"]), float(row["loss"]), float(row[STEPS_PER_SECOND])) for row in csv.DictReader(file)
            ]
    assert found == [(row["step"], row["loss"], row[STEPS_PER_SECOND]) for row in rows]


@pytest.mark.parametrize(
    "name, message",
    [
        ("wandb", r"logger: wandb needs wandb, which cannot be imported .*; pip install wandb"),
        ("mlflow", r"logger: mlflow needs mlflow, .*; pip install mlflow"),
        ("nope", "logger: 'nope' is unknown; use csv, wandb, mlflow, or MODULE.FUNCTION"),
        ("no_module_of_this.name", "logger: no_module_of_this.name needs no_module_of_this, .*; check the name"),
        (f"{__name__}.absent", "has no absent; name a function of the run's directory"),
    ],
)
def test_what_cannot_be_used_is_named_before_the_run_begins(name, message, config, monkeypatch):
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=message):
        train(single_process(), replace(config, logger=name))


def test_a_logger_that_does_not_close_is_a_warning(config, monkeypatch):
    monkeypatch.setattr(Fake, "finalize", lambda self, status: 1 / 0)
    with pytest.warns(UserWarning, match="logger: could not be closed: division by zero"):
        assert train(single_process(), config).step == 4


def test_a_server_knows_a_run_by_the_id_that_its_directory_holds(tmp_path):
    loggers._remember(tmp_path, "wandb", "abc")
    assert loggers._remembered(tmp_path, "wandb") == "abc"
    assert json.loads((tmp_path / loggers.IDS).read_text()) == {"wandb": "abc"}
    assert loggers._remembered(tmp_path, "mlflow") is None
    loggers._remember(tmp_path, "mlflow", "def")
    assert loggers._remembered(tmp_path, "wandb") == "abc"


def started_here(fabric, config):
    train(fabric, config)
    return len(STARTED)


@pytest.mark.distributed
def test_process_0_alone_logs(config):
    assert in_processes(started_here, 2, config) == [1, 0]
