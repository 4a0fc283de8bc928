"""Metrics that cost a step no host sync, and land in TensorBoard and ``metrics.jsonl``."""

import dataclasses
import json
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import sum_over_processes
from lightning_custom.events import (
    EventFile,
    histogram_value,
    hyperparameter_values,
    image_value,
    scalar_value,
)

ROWS = "metrics.jsonl"
STEPS_PER_SECOND = "time/steps_per_second"


class MetricLogger:
    """Sums on the device while training, one host sync and one TensorBoard event when flushed.

        metrics.update({"loss/generator": g_loss})        # every step; no sync
        row = metrics.flush(step)                         # mean since the last flush, over all processes
        metrics.record(step, {"val/fid": 0.4})            # values known already

    Process 0 writes; the others only add their part. As part of a state it resumes to the bit: open sums are in the
    checkpoint, rows and events past the restored step are cut. ``hyperparameters`` (a config or a mapping) and the
    tags in ``headline`` fill TensorBoard's HPARAMS tab.
    """

    def __init__(
        self,
        fabric: Fabric,
        run_dir: str | Path | None,
        *,
        hyperparameters: Any = None,
        headline: Sequence[str] = (),
    ) -> None:
        self._fabric = fabric
        self._folder = Path(run_dir) if run_dir is not None and fabric.global_rank == 0 else None
        self._events = None if self._folder is None else EventFile(self._folder)
        self._hyperparameters = (
            dataclasses.asdict(hyperparameters)
            if dataclasses.is_dataclass(hyperparameters) and not isinstance(hyperparameters, type)
            else hyperparameters
        )
        self._headline = tuple(headline)
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        """The last value of every tag written by this process group, on every process."""
        self._step = 0
        self._clock = time.perf_counter()
        # MPS has no float64.
        self._dtype = torch.float32 if fabric.device.type == "mps" else torch.float64

    def update(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one value to the mean of each tag, without a host sync; ``weight`` is for example a batch's size."""
        sums = [self._open_sum(tag, weight) for tag in values]
        tensors = [self._scalar(value) for value in values.values()]
        torch._foreach_add_(sums, tensors, alpha=weight)

    def _open_sum(self, tag: str, weight: float) -> Tensor:
        if tag not in self._sums:
            self._sums[tag] = torch.zeros((), dtype=self._dtype, device=self._fabric.device)
            self._weights[tag] = 0.0
        self._weights[tag] += weight
        return self._sums[tag]

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach() if value.dim() == 0 else value.detach().reshape(())
        return torch.tensor(value, dtype=self._dtype, device=self._fabric.device)

    def flush(self, step: int) -> dict[str, float]:
        """Write the means since the last flush as the row of ``step``, start anew, and return them everywhere."""
        means = self._reduce()
        self._sums, self._weights = {}, {}
        now = time.perf_counter()
        means[STEPS_PER_SECOND] = (step - self._step) / max(now - self._clock, 1e-9)
        self._step, self._clock = step, now
        self._write(step, means)
        return means

    def _reduce(self) -> dict[str, float]:
        tags = sorted(self._sums)
        if not tags:
            return {}
        weights = torch.tensor([*(self._weights[tag] for tag in tags), _checksum(tags)], dtype=self._dtype)
        parts = torch.stack([self._sums[tag] for tag in tags])
        *totals, checksum = sum_over_processes(self._fabric, torch.cat([parts, weights.to(parts.device)])).tolist()
        if checksum != self._fabric.world_size * _checksum(tags):
            raise ValueError(f"metrics: processes updated different tags since the last flush; here {', '.join(tags)}")
        sums, counts = totals[: len(tags)], totals[len(tags) :]
        return {tag: total / count if count else math.nan for tag, total, count in zip(tags, sums, counts, strict=True)}

    def record(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Write values that are equal on every process, as a row of ``step``; return them."""
        row = {tag: float(value) for tag, value in values.items()}
        if row:
            self._step = max(self._step, step)
            self._write(step, row)
        return row

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self.latest.update(row)
        if self._events is None or self._folder is None:
            return
        self._events.write(step, [scalar_value(tag, value) for tag, value in row.items()])
        # JSON has no word for what is not finite.
        finite = {tag: value if math.isfinite(value) else None for tag, value in row.items()}
        with (self._folder / ROWS).open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Show a picture: ``[C, H, W]`` with C of 1 or 3, values in [0, 1]."""
        if self._events is not None:
            self._events.write(step, [image_value(tag, image)])

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Show the distribution of all entries of ``values``."""
        if self._events is not None:
            self._events.write(step, [histogram_value(tag, values)])

    def resume_at(self, step: int | None) -> None:
        """Cut rows and events past ``step``; None begins a fresh run and writes the hyperparameters."""
        self._step, self._clock = step or 0, time.perf_counter()
        if self._events is None or self._folder is None:
            return
        _cut_rows(self._folder / ROWS, step)
        self._events.cut(step)
        if step is None and self._hyperparameters:
            self._events.write(0, hyperparameter_values(self._hyperparameters, self._headline))

    def item_state_dict(self) -> dict[str, Any]:
        """The open sums of this process."""
        content = {"step": self._step, "sums": dict(self._sums), "weights": dict(self._weights)}
        return {f"process-{self._fabric.global_rank:05d}": content}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over one's own sums; on another number of processes, process 0 takes their total."""
        own = items.get(f"process-{self._fabric.global_rank:05d}")
        if len(items) == self._fabric.world_size and own is not None:
            parts = [own]
        else:
            parts = list(items.values()) if self._fabric.global_rank == 0 else []
        self._sums, self._weights = {}, {}
        # Every process must know every tag, since a flush reduces them all.
        for tag in {tag for item in items.values() for tag in item["sums"]}:
            self._open_sum(tag, 0.0)
        for part in parts:
            self._step = part["step"]
            for tag, total in part["sums"].items():
                self._sums[tag] += total.to(self._fabric.device)
                self._weights[tag] += part["weights"][tag]


def _checksum(tags: Sequence[str]) -> int:
    # Below 2**24, so that the sum over many processes is exact in float32 too.
    return zlib.crc32("\n".join(tags).encode()) % 2**12


def _cut_rows(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    kept = [] if step is None else [line for line in path.read_text().splitlines() if _is_until(line, step)]
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_until(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except ValueError:  # kill -9 cut the last line short
        return False


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, in order."""
    return [json.loads(line) for line in (Path(run_dir) / ROWS).read_text().splitlines()]
