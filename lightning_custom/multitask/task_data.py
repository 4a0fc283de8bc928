"""What a batch holds for several tasks: which inputs go through the trunk for which of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.data import evaluation_batches
from lightning_custom.errors import ConfigError


def passes_of(batch: Any, tasks: Sequence[str]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Inputs, and targets by task, of each pass through the trunk that ``batch`` asks for.

    A batch is (inputs, targets), whose targets are a mapping by task or a tensor ``[B, T]`` in the order of ``tasks``:
    one pass for all; or a mapping by task of (inputs, target): a pass for each, whose graphs stay apart.
    """
    if isinstance(batch, Mapping):
        if not batch.keys() <= set(tasks):
            raise ConfigError(
                f"data: a batch of {', '.join(map(str, batch))}; the heads are of {', '.join(tasks)}: give (inputs, "
                "targets), or (inputs, target) by task"
            )
        yield from ((inputs, {task: target}) for task, (inputs, target) in batch.items())
        return
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (Tensor, Mapping))):
        kinds = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, (tuple, list)) else ""
        raise ConfigError(
            f"data: a batch is a {type(batch).__name__}{f' of ({kinds})' if kinds else ''}; give (inputs, targets), "
            f"whose targets are a mapping by task or a tensor [B, {len(tasks)}]"
        )
    inputs, targets = batch
    if isinstance(targets, Tensor):
        if targets.dim() < 2 or targets.shape[1] != len(tasks):
            raise ConfigError(
                f"data: targets of shape {tuple(targets.shape)} for {len(tasks)} tasks; give [B, {len(tasks)}], or a "
                "mapping by task"
            )
        targets = dict(zip(tasks, targets.unbind(1), strict=True))
    require_tasks(tasks, data=targets)
    yield inputs, {task: targets[task] for task in tasks}


def batches_once(fabric: Fabric, data: Any, *, batch_size: int) -> Iterator[Any]:
    """Batches of every sample of a data set once; of data sets by task one task after another."""
    if not isinstance(data, Mapping):
        yield from evaluation_batches(fabric, data, batch_size=batch_size)
        return
    for task, part in data.items():
        yield from ({task: batch} for batch in evaluation_batches(fabric, part, batch_size=batch_size))


def require_tasks(tasks: Sequence[str], **given: Any) -> None:
    """:class:`ConfigError` where a mapping, by the name of its field, is not of ``tasks``; what is none is let be."""
    for field, mapping in given.items():
        if isinstance(mapping, Mapping) and set(mapping) != set(tasks):
            raise ConfigError(f"{field}: for {', '.join(map(str, mapping))}; the heads are of {', '.join(tasks)}")
