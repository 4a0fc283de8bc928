"""Metrics that cost a step no host sync, and land in TensorBoard and ``metrics.jsonl``."""

import dataclasses
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import divide_items, process_item, sum_over_processes
from lightning_custom.errors import NonFiniteError
from lightning_custom.events import (
    EventFile,
    histogram_value,
    hyperparameter_values,
    image_value,
    layout_values,
    scalar_value,
)
from lightning_custom.loggers import end_logger, find_logger
from lightning_custom.storage import fsync_file

ROWS = "metrics.jsonl"
STEPS_PER_SECOND = "time/steps_per_second"
_TAGS_AT_ONCE = 64


class MetricLogger:
    """Sums on the device while training, one host sync and one TensorBoard event when flushed.

        metrics.update({"loss/generator": g_loss})        # every step; no sync
        row = metrics.flush(step)                         # mean since the last flush, over all processes
        metrics.record(step, {"val/fid": 0.4})            # values known already

    Process 0 writes; the others only add their part. As part of a state it resumes to the bit: open sums are in the
    checkpoint, rows and events past the restored step are cut. ``hyperparameters`` (a config or a mapping) and the
    tags in ``headline`` fill TensorBoard's HPARAMS tab, ``layout`` its Custom Scalars: charts by title, with the tags
    (regular expressions) that each shows. Rows also go to the logger that a config names in its field ``logger``
    (:mod:`~lightning_custom.loggers`) and to those that Fabric was given. These cannot be cut: after a resume they get
    the rows past the restored step again.
    """

    def __init__(
        self,
        fabric: Fabric,
        run_dir: str | Path | None,
        *,
        hyperparameters: Any = None,
        headline: Sequence[str] = (),
        layout: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._fabric = fabric
        self._folder = Path(run_dir) if run_dir is not None and fabric.global_rank == 0 else None
        self._rows = None if run_dir is None else Path(run_dir) / ROWS
        self._events = None if self._folder is None else EventFile(self._folder)
        self._hyperparameters = (
            dataclasses.asdict(hyperparameters)
            if dataclasses.is_dataclass(hyperparameters) and not isinstance(hyperparameters, type)
            else hyperparameters
        )
        is_replay = getattr(hyperparameters, "replay_step", None) is not None
        name = None if run_dir is None or is_replay else getattr(hyperparameters, "logger", None)
        # Looked for on every process: an error of process 0 alone would leave the others waiting.
        self._make_logger = None if name is None else find_logger(name)
        self._logger: Any = None
        self._logger_is_used = False
        self._headline = tuple(headline)
        self._layout = dict(layout or {})
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        """The last value of every tag of the run, on every process; a resumed run begins with those of its rows."""
        self.resumed_from = 0
        """The step that this start of the program went on from, whatever checkpoint that took; 0 in a fresh run."""
        self._step = 0
        self._clock = time.perf_counter()
        # MPS has no float64.
        self._dtype = torch.float32 if fabric.device.type == "mps" else torch.float64

    def update(self, values: Mapping[str, Tensor | float], weight: float | None = None) -> None:
        """Add one value to the mean of each tag, without a host sync; ``weight`` is for example a batch's size.

        Without a weight every call counts alike, by all processes together as much as by one alone.
        """
        if weight is None:
            weight = 1 / self._fabric.world_size
        for tag, value in values.items():
            total = self._open_sum(tag, weight)
            number = _one_number(tag, value) if isinstance(value, Tensor) else value
            if weight:  # an empty part of a batch has no mean
                total.add_(number, alpha=weight)

    def _open_sum(self, tag: str, weight: float) -> Tensor:
        if tag not in self._sums:
            self._sums[tag] = torch.zeros((), dtype=self._dtype, device=self._fabric.device)
            self._weights[tag] = 0.0
        self._weights[tag] += weight
        return self._sums[tag]

    def flush(self, step: int, known: Mapping[str, float] | None = None) -> dict[str, float]:
        """Write the means since the last flush as the row of ``step``, start anew, and return them everywhere.

        ``known`` are values that go into the row as they are, equal on every process.
        """
        means = self.means()
        for tag, mean in means.items():
            if "loss" in tag and not math.isfinite(mean):
                raise NonFiniteError(f"{tag} is {mean}", step=step)
        means |= known or {}
        now = time.perf_counter()
        means[STEPS_PER_SECOND] = (step - self._step) / max(now - self._clock, 1e-9)
        self._step, self._clock = step, now
        self._write(step, means)
        return means

    def means(self) -> dict[str, float]:
        """The mean of every tag since the last flush, over all processes; start anew, writing nothing."""
        means = self._reduce()
        self._sums, self._weights = {}, {}
        return means

    def _reduce(self) -> dict[str, float]:
        """The mean of every tag over processes, by one reduction for each 64 tags."""
        tags = sorted(self._sums)
        means: dict[str, float] = {}
        # Parts of one fixed size: sizes that differ by process would abort the run inside the backend.
        for start in range(0, max(len(tags), 1), _TAGS_AT_ONCE):
            part = tags[start : start + _TAGS_AT_ONCE]
            header, sums, weights = sum_over_processes(self._fabric, self._packed(tags, part)).tolist()
            # The squares' mean equals the mean's square only if all processes sent the same checksum.
            if self._fabric.world_size > 1 and self._fabric.world_size * header[1] != header[0] ** 2:
                raise ValueError(
                    f"metrics: processes updated different tags since the last flush; process "
                    f"{self._fabric.global_rank} updated {', '.join(tags) or 'none'}; update the same on all"
                )
            means |= {tag: sums[i] / weights[i] if weights[i] else math.nan for i, tag in enumerate(part)}
        return means

    def _packed(self, tags: Sequence[str], part: Sequence[str]) -> Tensor:
        """``[3, 64]``: a checksum of all tags and its square; the sums of ``part``; their weights."""
        buffer = torch.zeros(3, _TAGS_AT_ONCE, dtype=self._dtype)
        checksum = zlib.crc32("\n".join(tags).encode()) % 2**20
        buffer[0, 0], buffer[0, 1] = checksum, checksum**2
        buffer[2, : len(part)] = torch.tensor([self._weights[tag] for tag in part], dtype=self._dtype)
        buffer = buffer.to(self._fabric.device)
        if part:
            buffer[1, : len(part)] = torch.stack([self._sums[tag] for tag in part])
        return buffer

    def record(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Write values that are equal on every process, as a row of ``step``; return them."""
        row = {tag: float(value) for tag, value in values.items()}
        if row:
            self._write(step, row)
        return row

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self.latest.update(row)
        for logger in self._fabric.loggers:
            logger.log_metrics(dict(row), step)
        if self._logger is not None:
            self._logger.log_metrics(dict(row), step)
            self._logger_is_used = True
        if self._events is None or self._folder is None:
            return
        self._events.write(step, [scalar_value(tag, value) for tag, value in row.items()])
        # JSON has no word for what is not finite.
        finite = {tag: value if math.isfinite(value) else None for tag, value in row.items()}
        with (self._folder / ROWS).open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def sync(self) -> None:
        """Bring rows and events to the disk: a checkpoint that is there must not be ahead of them."""
        if self._events is not None and self._folder is not None:
            self._events.sync()
            if (self._folder / ROWS).exists():
                fsync_file(self._folder / ROWS)

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
        self._step = self.resumed_from = step or 0
        self._clock = time.perf_counter()
        # Each process reads the rows itself: process 0 replaces the file by one with the same rows up to this step.
        kept = [] if self._rows is None or step is None else _rows_until(self._rows, step)
        self.latest = {tag: math.nan if value is None else value for _, row in kept for tag, value in row.items()}
        self.latest.pop("step", None)
        if self._events is None or self._folder is None:
            return
        _write_rows(self._folder / ROWS, [line for line, _ in kept])
        self._events.cut(step)
        if step is None and self._hyperparameters:
            self._events.write(0, hyperparameter_values(self._hyperparameters, self._headline))
        if step is None and self._layout:
            self._events.write(0, layout_values(self._layout))
        if self._make_logger is not None:
            self._logger, self._logger_is_used = self._make_logger(self._folder), False
            if step is None and self._hyperparameters:
                with suppress(NotImplementedError):  # Fabric's CSVLogger
                    self._logger.log_hyperparams(dict(self._hyperparameters))
                self._logger_is_used = True

    def end_run(self, status: str) -> None:
        """Close the logger that the config names, if any; ``status`` is success or failed."""
        logger, self._logger = self._logger, None
        if logger is None or not self._logger_is_used:
            return
        try:
            end_logger(logger, status)
        except Exception as error:  # a server that is away; the run itself is saved
            warnings.warn(f"logger: could not be closed: {error}", stacklevel=2)

    def item_state_dict(self) -> dict[str, Any]:
        """The open sums of this process."""
        return {process_item(self._fabric): {"sums": dict(self._sums), "weights": dict(self._weights)}}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over one's own sums; on another number of processes they are dealt out."""
        self._sums, self._weights = {}, {}
        # Every process must know every tag, since a flush reduces them all.
        for tag in {tag for item in items.values() for tag in item["sums"]}:
            self._open_sum(tag, 0.0)
        for part in divide_items(self._fabric, items):
            for tag, total in part["sums"].items():
                self._sums[tag] += total.to(self._fabric.device)
                self._weights[tag] += part["weights"][tag]


def _one_number(tag: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"metrics: {tag} has shape {tuple(value.shape)}; log one number, such as its mean")
    return value.detach() if value.dim() == 0 else value.detach().reshape(())


def _rows_until(path: Path, step: int) -> list[tuple[str, dict[str, Any]]]:
    """The rows up to ``step``, each with its line."""
    rows = [(line, json.loads(line)) for line in _whole_lines(path)] if path.exists() else []
    return [(line, row) for line, row in rows if row["step"] <= step]


def _write_rows(path: Path, lines: Sequence[str]) -> None:
    if not path.exists():
        return
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, in order, but for a last one that a crash cut short."""
    return [json.loads(line) for line in _whole_lines(Path(run_dir) / ROWS)]


def is_logged(run_dir: str | Path, step: int, tag: str) -> bool:
    """Whether ``metrics.jsonl`` has a value of ``tag`` at ``step``."""
    rows = read_rows(run_dir) if (Path(run_dir) / ROWS).exists() else []
    return any(row["step"] == step and tag in row for row in rows)


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
