"""The contenders do the same work: otherwise their times say nothing."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import TensorDataset

from lightning_custom.networks import ConvClassifier
from tests.benchmarks.classification_step import CLASSES, LOG_EVERY, LOOPS, PEERS, RECIPE, Task, run

BATCH, STEPS = 4, LOG_EVERY + 2
RAW = "raw PyTorch"
SCORES = ("train/accuracy", "train/precision", "train/recall", "train/f1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each contender's network after its run, and the run's folder."""
    # One sample over and over: every order of the data gives the same batches.
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(image.repeat(STEPS * BATCH, 1, 1, 1), torch.full((STEPS * BATCH,), 3))
    task = Task(lambda: ConvClassifier(1, 8, CLASSES, 8), data, BATCH)
    folders = {name: tmp_path_factory.mktemp("run") for name in LOOPS}
    return {name: (run(loop, task, str(folders[name])), folders[name]) for name, loop in LOOPS.items()}


def first_scores(folder: Path) -> dict[str, float]:
    events = [EventAccumulator(str(file)).Reload() for file in folder.rglob("events.out.tfevents.*")]
    return {tag: found.Scalars(tag)[0].value for tag in SCORES for found in events if tag in found.Tags()["scalars"]}


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_does_the_updates_of_raw_pytorch(name, runs):
    (model, _), (reference, _) = runs[name], runs[RAW]
    assert len(model.times) == STEPS
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_logs_the_scores_of_the_recipe(name, runs):
    expected = first_scores(runs[RECIPE][1])
    assert 0 < expected["train/accuracy"] < 1
    assert first_scores(runs[name][1]) == pytest.approx(expected, abs=1e-6)
