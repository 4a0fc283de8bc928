import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_custom.confusion import ConfusionMatrix
from lightning_custom.testing import in_processes, single_process

NUM_CLASSES = 6


def samples(size=200, *, absent=()):
    """Logits and labels; the classes of ``absent`` occur nowhere, class 4 is never predicted."""
    generator = torch.Generator().manual_seed(size)
    labels = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    logits = torch.randn(size, NUM_CLASSES, generator=generator)
    logits[torch.arange(size), labels] += 1.0
    logits[:, [4, *absent]] = -100.0
    keep = torch.tensor([label not in absent for label in labels.tolist()])
    return logits[keep], labels[keep]


def sklearn_scores(logits, labels):
    predictions = logits.argmax(1)
    macro = precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)[:3]
    return [accuracy_score(labels, predictions), *macro]


def torchmetrics_scores(logits, labels):
    metrics = [
        MulticlassAccuracy(NUM_CLASSES, average="micro"),
        MulticlassPrecision(NUM_CLASSES, average="macro"),
        MulticlassRecall(NUM_CLASSES, average="macro"),
        MulticlassF1Score(NUM_CLASSES, average="macro"),
    ]
    return [metric(logits, labels).item() for metric in metrics]


def four(scores):
    return [scores.accuracy, scores.precision, scores.recall, scores.f1]


def counted(*batches):
    confusion = ConfusionMatrix(NUM_CLASSES, single_process())
    for logits, labels in batches:
        confusion.update(logits, labels)
    return confusion


@pytest.mark.parametrize("absent", [(), (0,), (2, 5)])
def test_scores_are_scikit_learns_and_torchmetrics(absent):
    logits, labels = samples(absent=absent)
    scores = counted(*zip(logits.split(64), labels.split(64), strict=True)).compute()
    assert four(scores) == pytest.approx(sklearn_scores(logits, labels), abs=1e-12)
    assert four(scores) == pytest.approx(torchmetrics_scores(logits, labels), abs=1e-6)
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(NUM_CLASSES))
    assert np.array_equal(scores.counts.numpy(), expected)
    for k in range(NUM_CLASSES):
        own = labels == k
        share = (logits.argmax(1)[own] == k).double().mean().item()
        assert scores.class_accuracy[k] == pytest.approx(share, nan_ok=True)
        assert np.isnan(scores.class_accuracy[k]) == (k in absent)


def test_predicted_classes_serve_as_well_as_logits():
    logits, labels = samples()
    assert torch.equal(counted((logits, labels)).compute().counts, counted((logits.argmax(1), labels)).compute().counts)


def test_the_scores_have_tags():
    logits, labels = samples()
    scores = counted((logits, labels)).compute()
    named = scores.scores("val/")
    assert [named[f"val/{name}"] for name in ("accuracy", "precision", "recall", "f1")] == four(scores)
    assert named["val/class_accuracy/3"] == scores.class_accuracy[3]


def test_without_samples_every_score_is_zero():
    assert four(counted().compute()) == [0.0] * 4


def test_a_reset_begins_anew():
    confusion = counted(samples())
    confusion.reset()
    assert confusion.compute().counts.sum() == 0
    logits, labels = samples(50)
    confusion.update(logits, labels)
    assert four(confusion.compute()) == pytest.approx(sklearn_scores(logits, labels))


@pytest.mark.parametrize("prediction, label", [(0, -1), (NUM_CLASSES, 0), (1, NUM_CLASSES), (-1, 1)])
def test_what_is_no_class_is_refused_instead_of_counted_as_another(prediction, label):
    confusion = counted((torch.tensor([2, prediction]), torch.tensor([2, label])))
    with pytest.raises(ValueError, match=r"1 of 2 samples have a label or prediction outside 0 to 5; set num_classes"):
        confusion.compute()


def test_open_counts_resume():
    first, second = samples(40), samples(60)
    straight = counted(first, second)
    resumed = ConfusionMatrix(NUM_CLASSES, single_process())
    resumed.load_item_state_dict(counted(first).item_state_dict())
    resumed.update(*second)
    assert torch.equal(resumed.compute().counts, straight.compute().counts)


def test_an_update_waits_for_nothing(monkeypatch):
    """What would wait for a device: reading a value back on the host."""
    confusion, (logits, labels) = counted(), samples()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    confusion.update(logits, labels)


def work(fabric):
    logits, labels = samples()
    part = slice(0, 37) if fabric.global_rank == 0 else slice(37, None)
    confusion = ConfusionMatrix(NUM_CLASSES, fabric)
    confusion.update(logits[part], labels[part])
    own = confusion.item_state_dict()
    scores = confusion.compute()
    halves = ConfusionMatrix(NUM_CLASSES, fabric)
    halves.load_item_state_dict(counted((logits, labels)).item_state_dict())
    return {"scores": four(scores), "counts": scores.counts, "own": own, "from one": halves.compute().counts}


@pytest.mark.distributed
def test_uneven_parts_of_two_processes_give_the_scores_of_the_whole():
    logits, labels = samples()
    whole = counted((logits, labels)).compute()
    results = in_processes(work, 2)
    for result in results:
        assert result["scores"] == pytest.approx(sklearn_scores(logits, labels), abs=1e-12)
        assert torch.equal(result["counts"], whole.counts)
        assert torch.equal(result["from one"], whole.counts)
    alone = ConfusionMatrix(NUM_CLASSES, single_process())
    alone.load_item_state_dict({**results[0]["own"], **results[1]["own"]})
    assert torch.equal(alone.compute().counts, whole.counts)
