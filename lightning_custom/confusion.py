"""Classification scores from one matrix of counts, which a step adds to without a host sync."""

from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import divide_items, process_item, sum_over_processes

_AT_ONCE = 64


class ClassificationScores(NamedTuple):
    """Scores over all samples counted, by scikit-learn's conventions: 0 where a denominator is 0.

    Macro scores are means over the classes that occur among labels or predictions.
    """

    counts: Tensor
    """``[K, K]`` int64 on the CPU: samples by label (row) and prediction (column)."""
    accuracy: float
    precision: float
    """Macro precision."""
    recall: float
    """Macro recall."""
    f1: float
    """Macro F1."""
    class_accuracy: list[float]
    """For each class the share of its samples that were predicted as it (its recall); nan for a class without any."""

    def scores(self, prefix: str = "") -> dict[str, float]:
        """The scores as metrics with tags: accuracy, precision, recall, f1, and one accuracy a class."""
        named = {"accuracy": self.accuracy, "precision": self.precision, "recall": self.recall, "f1": self.f1}
        classes = {f"class_accuracy/{k}": value for k, value in enumerate(self.class_accuracy)}
        return {f"{prefix}{name}": value for name, value in {**named, **classes}.items()}


class ConfusionMatrix:
    """Counts of (label, prediction) on the device: one matrix gives every usual score.

    As a field of a state its open counts are in the checkpoint, by process. An update takes about 10 microseconds on a
    CPU (``python -m tests.benchmarks.layer_overhead``).
    """

    def __init__(self, num_classes: int, fabric: Fabric) -> None:
        self.num_classes = num_classes
        self.latest = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """Counts of all processes at the last flush, for a picture; zeros before the first."""
        self._fabric = fabric
        self._waiting: list[Tensor] = []
        # A border of one cell counts what is no class, which a check would need a host sync to refuse at once.
        self._counts = torch.zeros((num_classes + 2) ** 2, dtype=torch.int64, device=fabric.device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count samples: ``predictions`` ``[B]`` classes or ``[B, K]`` logits, ``labels`` ``[B]``, on the device."""
        classes = predictions.argmax(1) if predictions.dim() > 1 else predictions
        # Counting takes five times as long as keeping, so it is done for many updates at once.
        self._waiting.append(torch.stack([labels, classes]))
        if len(self._waiting) == _AT_ONCE:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            size = self.num_classes
            rows, columns = _within_border(torch.cat(self._waiting, dim=1), size)
            # Row and column -1, which the border begins with, stand at 0.
            cells = torch.add(columns, rows, alpha=size + 2).add_(size + 3)
            self._counts.index_add_(0, cells, torch.ones_like(cells))
            self._waiting.clear()

    def compute(self) -> ClassificationScores:
        """The scores over all processes; the one host sync.

        ``ValueError`` on all processes where a label or prediction since the last reset is not in [0, K).
        """
        self._count()
        bordered = sum_over_processes(self._fabric, self._counts).cpu().view(self.num_classes + 2, -1)
        counts = bordered[1:-1, 1:-1].clone()
        samples, unknown = int(bordered.sum()), int(bordered.sum() - counts.sum())
        if unknown:
            raise ValueError(
                f"confusion: {unknown} of {samples} samples have a label or prediction outside 0 to "
                f"{self.num_classes - 1}; set num_classes to the number of classes, and leave out what is none"
            )
        matrix = counts.double()
        correct, labelled, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        occurs = labelled + predicted > 0
        precision, recall = _ratio(correct, predicted), _ratio(correct, labelled)
        f1 = _ratio(2 * correct, labelled + predicted)
        return ClassificationScores(
            counts=counts,
            accuracy=float(_ratio(correct.sum(), matrix.sum())),
            precision=_mean(precision[occurs]),
            recall=_mean(recall[occurs]),
            f1=_mean(f1[occurs]),
            class_accuracy=(correct / labelled).tolist(),
        )

    def flush(self, prefix: str = "") -> dict[str, float]:
        """The scores since the last flush, as metrics with tags; begin to count anew."""
        result = self.compute()
        self.latest = result.counts
        self.reset()
        return result.scores(prefix)

    def reset(self) -> None:
        """Begin to count anew."""
        self._waiting.clear()
        self._counts.zero_()

    def item_state_dict(self) -> dict[str, Any]:
        """The open counts of this process."""
        self._count()
        return {process_item(self._fabric): self._counts.clone()}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over one's own counts; on another number of processes they are dealt out."""
        self.reset()
        for counts in divide_items(self._fabric, items):
            self._counts += counts.to(self._counts.device)


def _within_border(classes: Tensor, size: int) -> Tensor:
    """``classes`` with everything that is none moved to -1 or ``size``."""
    # Narrow integers would overflow in the product; index_add_ refuses floating-point numbers.
    return (classes if classes.is_floating_point() else classes.long()).clamp(-1, size)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1), torch.zeros_like(numerator))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
