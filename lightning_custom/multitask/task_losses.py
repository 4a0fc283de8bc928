"""The losses of all tasks over all processes, where some samples have no label; and scores of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric, MetricCollection

from lightning_custom.distributed import divide_items, process_item, sum_over_processes
from lightning_custom.errors import ConfigError
from lightning_custom.multitask.conflict import delta_m

MISSING = -100
"""The integer that stands for no label, as in torch's cross-entropy; among floating-point targets it is nan."""

Loss = Callable[[Any, Any], Tensor]
"""``(outputs [B, ...], targets [B, ...])`` to a value for each sample ``[B]`` or label, or to their mean."""


class TaskLosses(NamedTuple):
    """The losses of T tasks in a step."""

    local: Tensor
    """``[T]`` with their graph: this process's part, times the number of processes; their mean is :attr:`means`."""
    means: Tensor
    """``[T]``: the sum over the labels of all processes divided by their number; 0 without any."""
    present: Tensor
    """``[T]``: whether a task has a label on any process."""
    sums: Tensor
    """``[T]`` of this process alone."""
    counts: Tensor
    """``[T]``: labels of this process alone."""


def task_losses(
    fabric: Fabric, losses: Mapping[str, Loss], outputs: Mapping[str, Any], targets: Mapping[str, Any]
) -> TaskLosses:
    """The loss of each task of ``losses``, of whose outputs and targets some or all may be missing.

    Missing is a task without outputs in this step, an integer target of -100, and a floating-point one that is nan:
    such a label has no part in the loss or its mean. Where a task's targets are several tensors, or the loss gives a
    value for a sample of several labels, a sample needs all. A loss that gives a mean is asked a second time for the
    labelled samples where some are not, after a look at the device; one that gives a value for each waits for nothing.
    One reduction over processes. :class:`ConfigError` for a mean over samples with a part of their labels.
    """
    dtype = _widest(fabric)
    found = [
        _sum_and_count(task, loss, outputs[task], targets[task]) if task in outputs else None
        for task, loss in losses.items()
    ]
    zero = torch.zeros((), device=fabric.device)
    sums = torch.stack([zero if one is None else one[0] for one in found])
    counts = torch.stack([zero.to(dtype) if one is None else one[1].to(dtype) for one in found])
    local = torch.stack([sums.detach().to(dtype), counts])
    total_sums, total_counts = sum_over_processes(fabric, local)
    return TaskLosses(
        local=sums * (fabric.world_size / total_counts.clamp_min(1)).to(sums.dtype),
        means=total_sums / total_counts.clamp_min(1),
        present=total_counts > 0,
        sums=local[0],
        counts=local[1],
    )


def _sum_and_count(task: str, loss: Loss, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The sum of a loss over its labels, and their number."""
    there = has_label(targets)
    values = loss(outputs, tree_map(_filled, targets))
    if not isinstance(values, Tensor):
        raise ConfigError(f"losses: that of {task!r} gave a {type(values).__name__}; give a tensor, [B] or a mean")
    if values.dim() == 0:
        return _sum_of_mean(task, loss, values, outputs, targets)
    if len(values) != len(there):
        raise ConfigError(
            f"losses: that of {task!r} gave {len(values)} values for {len(there)} samples; give one for each, or a mean"
        )
    there = _shaped_like(values, there)
    return torch.where(there, values, 0).sum(), there.sum()


def _sum_of_mean(task: str, loss: Loss, mean: Tensor, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    labels = has_label(targets)
    there = _by_sample(labels)
    count = there.sum()
    whole, some = torch.stack([count, labels.flatten(1).any(1).sum() if labels.dim() > 1 else count]).tolist()
    if whole < some:
        raise ConfigError(
            f"losses: that of {task!r} gave a mean, but {some - whole} of {len(there)} samples have only some of their "
            "labels; give a value for each label (reduction='none')"
        )
    if whole == 0:
        return torch.where(there.any(), mean, 0), count
    if whole < len(there):
        mean = loss(*labelled(outputs, targets))
    return mean * count, count


def has_label(targets: Any) -> Tensor:
    """Which labels are there: entry by entry of one tensor ``[B, ...]``, which samples have all of several ``[B]``."""
    there = [~_missing(part) for part in tree_leaves(targets) if isinstance(part, Tensor)]
    return there[0] if len(there) == 1 else torch.stack([_by_sample(part) for part in there]).all(0)


def labelled(outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Outputs and targets of the samples that have every label; waits for the device.

    Of integers ``[B, ...]``, such as a segmentation, those that have any; -100 stays in them.
    """
    there = has_label(targets)
    by_entry = isinstance(targets, Tensor) and there.dim() > 1 and not targets.is_floating_point()
    there = there.flatten(1).any(1) if by_entry else _by_sample(there)
    return tree_map(lambda part: part[there], outputs), tree_map(lambda part: part[there], targets)


def update_metric(metric: Metric | MetricCollection, outputs: Any, targets: Any) -> None:
    """Give ``metric`` what :func:`labelled` leaves of a batch, unless it is nothing, which some do not bear."""
    outputs, targets = labelled(outputs, targets)
    if any(len(part) for part in tree_leaves(targets)):
        metric.update(outputs, targets)


def _filled(targets: Any) -> Any:
    """Targets with a label of the batch, or 0, in place of what is missing."""
    if not isinstance(targets, Tensor):
        return targets
    missing = _missing(targets)
    if not targets.is_floating_point():
        return targets.masked_fill(missing, 0)
    if not targets.numel():
        return targets
    # A loss that divides by its target would have a gradient of nan at 0, and 0 times nan is not 0.
    label = targets.take((~missing).flatten().byte().argmax()).nan_to_num(0.0)
    return torch.where(missing, label, targets)


def _missing(targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return targets.isnan()
    # Among unsigned numbers -100 would be taken for 156.
    return targets == MISSING if targets.dtype.is_signed else torch.zeros_like(targets, dtype=torch.bool)


def _by_sample(labelled: Tensor) -> Tensor:
    return labelled.flatten(1).all(1) if labelled.dim() > 1 else labelled


def _shaped_like(values: Tensor, there: Tensor) -> Tensor:
    if there.dim() > values.dim():
        there = there.flatten(values.dim()).all(-1)
    return there.reshape(*there.shape, *[1] * (values.dim() - there.dim())).expand_as(values)


def _widest(fabric: Fabric) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if fabric.device.type == "mps" else torch.float64


class Scores(NamedTuple):
    """Scores over labels, each by task; nan for a task without a label."""

    loss: dict[str, float]
    accuracy: dict[str, float]
    """Of tasks with integer targets ``[B, ...]`` and logits ``[B, K, ...]``."""
    error: dict[str, float]
    """Mean absolute error, of tasks with floating-point targets and outputs of one shape."""

    def tags(self, prefix: str) -> dict[str, float]:
        """As metrics with tags: each by task, the sum of the losses, and the means of the others."""
        values = {f"{prefix}{kind}/{task}": value for kind, of in self._asdict().items() for task, value in of.items()}
        values[f"{prefix}loss"] = sum(self.loss.values())
        for kind, of in (("accuracy", self.accuracy), ("error", self.error)):
            if of:
                values[f"{prefix}{kind}"] = sum(of.values()) / len(of)
        return values

    def delta_m(self, baselines: Mapping[str, float]) -> float:
        """Mean relative gain in percent over the accuracy, or error, that each task alone reaches."""
        scores = self.accuracy | self.error
        unscored = [task for task in self.loss if task not in scores]
        if unscored:
            raise ConfigError(f"baselines: task {unscored[0]!r} has neither accuracy nor error; leave them out")
        known = {task: float(baselines[task]) for task in scores if task in baselines}
        return delta_m(scores, known, {task: task in self.accuracy for task in scores})


class TaskScores:
    """Each task's mean loss, and its accuracy or mean absolute error, over labels; sums on the device.

    Of outputs and targets of any other kind there is only the loss. As a field of a state its open sums are in the
    checkpoint, by process.
    """

    def __init__(self, fabric: Fabric, tasks: Sequence[str]) -> None:
        self._fabric, self._tasks = fabric, tuple(tasks)
        self._kinds: dict[str, str] = {}
        # Rows: losses, their labels, scores, their labels.
        self._sums = torch.zeros(4, len(self._tasks), dtype=_widest(fabric), device=fabric.device)

    @torch.no_grad()
    def update(self, found: TaskLosses, outputs: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        """Add a step's losses and outputs, without a host sync."""
        self._sums[0] += found.sums
        self._sums[1] += found.counts
        for i, task in enumerate(self._tasks):
            if task in outputs and (kind := _kind(outputs[task], targets[task])) is not None:
                self._kinds[task] = kind
                there = has_label(targets[task])
                if kind == "accuracy":
                    values = (outputs[task].argmax(1) == targets[task]).to(self._sums.dtype)
                else:
                    values = (outputs[task] - _filled(targets[task])).abs().to(self._sums.dtype)
                self._sums[2, i] += torch.where(there, values, 0).sum()
                self._sums[3, i] += there.sum()

    def flush(self) -> Scores:
        """The scores over all processes since the last flush, in one host sync; begin anew."""
        losses, labels, scores, scored = sum_over_processes(self._fabric, self._sums).tolist()
        self._sums.zero_()
        found = Scores({}, {}, {})
        for i, task in enumerate(self._tasks):
            if scored[i] and not labels[i] and self._fabric.global_rank == 0:
                warnings.warn(
                    f"losses: that of {task!r} gave a value a sample, and no sample had all of its labels: nothing was "
                    "learned; give a value a label",
                    stacklevel=2,
                )
            found.loss[task] = losses[i] / labels[i] if labels[i] else float("nan")
            if task in self._kinds:
                by_task = found.accuracy if self._kinds[task] == "accuracy" else found.error
                by_task[task] = scores[i] / scored[i] if scored[i] else float("nan")
        return found

    def item_state_dict(self) -> dict[str, Any]:
        """The open sums of this process."""
        return {process_item(self._fabric): {"sums": self._sums.clone(), "kinds": dict(self._kinds)}}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over one's own sums; on another number of processes they are dealt out."""
        self._sums.zero_()
        for item in items.values():
            self._kinds |= item["kinds"]
        for item in divide_items(self._fabric, items):
            self._sums += item["sums"].to(self._sums.device)


def _kind(outputs: Any, targets: Any) -> str | None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        return "error" if outputs.shape == targets.shape else None
    return "accuracy" if outputs.dim() == targets.dim() + 1 else None
