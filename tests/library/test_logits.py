import pytest
import torch
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_custom.logits import pairs_told_apart, show_logits
from lightning_custom.metrics import MetricLogger
from lightning_custom.testing import in_processes, single_process


def logits(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(60, generator=draw) + 1).round(decimals=1), torch.randn(60, generator=draw).round(decimals=1)


def test_pairs_told_apart_are_the_area_under_the_roc_curve():
    real, fake = logits()
    expected = roc_auc_score([1] * 60 + [0] * 60, torch.cat([real, fake]))  # ties among them
    assert pairs_told_apart(real, fake) == pytest.approx(expected)
    assert pairs_told_apart(real, real) == 0.5
    assert pairs_told_apart(real + 100, fake) == 1.0


def test_means_are_for_the_row_and_distributions_for_tensorboard(tmp_path):
    real, fake = logits()
    fabric = single_process()
    metrics = MetricLogger(fabric, tmp_path)
    halves = zip(real.chunk(3), fake.chunk(3), strict=True)
    row = show_logits(fabric, metrics, 7, [torch.cat(half).requires_grad_() for half in halves])
    assert row["logit/real"] == pytest.approx(real.mean().item())
    assert row["logit/fake"] == pytest.approx(fake.mean().item())
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, values in (("logit/real", real), ("logit/fake", fake)):
        (event,) = events.Histograms(tag)
        assert event.step == 7
        assert event.histogram_value.num == 60
        assert event.histogram_value.sum == pytest.approx(values.sum().item(), rel=1e-5)


def work(fabric, folder):
    real, fake = (part.chunk(2)[fabric.global_rank] for part in logits())
    return show_logits(fabric, MetricLogger(fabric, folder), 1, [torch.cat([real, fake])])


@pytest.mark.distributed
def test_two_processes_show_the_whole_batch(tmp_path):
    real, fake = logits()
    fabric = single_process()
    expected = show_logits(fabric, MetricLogger(fabric, tmp_path / "one"), 1, [torch.cat([real, fake])])
    for row in in_processes(work, 2, str(tmp_path / "two")):
        assert row == expected
