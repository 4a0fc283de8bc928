"""Runs side by side: what lies under a directory, where two differ, and a curve of each.

Listing reads a few small files a run and starts neither torch nor TensorBoard.
"""

import difflib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_custom.errors import ConfigError

_STATUS, _BEST, _ROWS, _LOCK, _CONFIG = (
    "status.json", "checkpoints/best.json", "metrics.jsonl", ".lock", "config.yaml"
)  # fmt: skip
_TAIL = 2**16


@dataclass(frozen=True)
class RunSummary:
    """What a run directory says of its run."""

    path: Path
    recipe: str
    state: str
    """running, stopped, complete or failed; killed: it says running, but nobody holds its lock."""
    step: int
    steps: int
    best_name: str | None
    """The score that the run keeps the best checkpoint of, once one has it."""
    best: float | None
    age: float
    """Seconds since it last wrote its status or a row."""


def find_runs(root: Path) -> list[RunSummary]:
    """The runs under ``root``, at any depth and ``root`` itself included, by path.

    A ``status.json`` that is not a run's is passed over.
    """
    if not root.is_dir():
        raise ConfigError(f"DIR: {root} is not a directory; give the one that your runs are in")
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != "checkpoints"]
        if _STATUS in files:
            with suppress(ConfigError):
                found.append(summarise(Path(folder)))
    return sorted(found, key=lambda run: run.path)


def summarise(path: Path) -> RunSummary:
    """The run in ``path``; :class:`ConfigError` where there is none."""
    try:
        status = json.loads((path / _STATUS).read_text())
        recipe, state, step, steps = (status[name] for name in ("recipe", "state", "step", "steps"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"RUN: {path} has no {_STATUS} of a run; give the directory of one") from error
    if state == "running":
        if _is_held(path / _LOCK):
            step = max(step, _last_step(path / _ROWS))  # the status is as old as the last checkpoint
        else:
            state = "killed"
    name, value = _best_score(path)
    written = max((path / file).stat().st_mtime for file in (_STATUS, _ROWS) if (path / file).exists())
    return RunSummary(path, recipe, state, step, steps, name, value, time.time() - written)


def _is_held(lock: Path) -> bool:
    """Whether a process holds the run's lock, asked by a shared lock that is let go at once."""
    try:
        import fcntl
    except ImportError:  # Windows, where a run takes no lock
        return True
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _last_step(rows: Path) -> int:
    if not rows.exists():
        return 0
    with rows.open("rb") as file:
        file.seek(max(rows.stat().st_size - _TAIL, 0))
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    with suppress(IndexError, ValueError):  # no row yet, or one longer than what was read
        return int(json.loads(whole[-1])["step"])
    return 0


def _best_score(path: Path) -> tuple[str | None, float | None]:
    if not (path / _BEST).exists():
        return None, None
    content = json.loads((path / _BEST).read_text())
    name = next(name for name in content if name not in ("step", "folder"))
    return name, content[name]


def listing(runs: Sequence[RunSummary]) -> str:
    """A line for each run under a line of headings."""
    lines = [["run", "recipe", "step", "state", "best", "", "age"]]
    for run in runs:
        best = "-" if run.best is None else f"{run.best:.4g}"
        progress = f"{run.step}/{run.steps}"
        lines.append([str(run.path), run.recipe, progress, run.state, run.best_name or "-", best, duration(run.age)])
    return table(lines)


def duration(seconds: float) -> str:
    """The largest unit of a time, in whole numbers.

    >>> [duration(seconds) for seconds in (0.4, 59, 150, 7300, 200_000)]
    ['0s', '59s', '2m', '2h', '2d']
    """
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(max(seconds, 0))}s"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines whose cells stand in columns.

    >>> print(table([["a", "bbb", "c"], ["aa", "b", "c"]]))
    a   bbb  c
    aa  b    c
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def comparison(paths: Sequence[Path]) -> str:
    """The settings in which runs differ, then how far each came, its best score and its last value of every tag."""
    runs, names = [summarise(path) for path in paths], short_names(paths)
    configs = [{"recipe": run.recipe, **_config(run.path)} for run in runs]
    settings = [[name, *map(_shown, values)] for name, values in _side_by_side(configs) if _differ(values)]
    results = [["step", *(f"{run.step}/{run.steps}" for run in runs)], ["state", *(run.state for run in runs)]]
    for name in dict.fromkeys(run.best_name for run in runs if run.best_name):
        results.append([f"best {name}", *(_number(run.best if run.best_name == name else None) for run in runs)])
    last = [last_values(run.path) for run in runs]
    results += [[tag, *map(_number, values)] for tag, values in _side_by_side(last)]
    empty = ["" for _ in ("", *runs)]
    return table([["", *names], *(settings or [["equal settings", *empty[1:]]]), empty, *results])


def _config(path: Path) -> dict[str, Any]:
    from lightning_custom.config import read_config

    return read_config(path / _CONFIG)


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, _ABSENT) for column in columns]) for name in names]


_ABSENT = object()


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _shown(value: Any) -> str:
    return "-" if value is _ABSENT else str(value)


def _number(value: Any) -> str:
    return "-" if value is None or value is _ABSENT else f"{value:.6g}"


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without what all of them begin with.

    >>> short_names([Path("runs/gan/a"), Path("runs/gan/b/c")])
    ['a', 'b/c']
    """
    whole = [path.resolve() for path in paths]
    start = os.path.commonpath([path.parent for path in whole])
    return [path.relative_to(start).as_posix() for path in whole]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The run's rows of metrics; none where it has not come that far."""
    from lightning_custom.metrics import read_rows

    return read_rows(path) if (path / _ROWS).exists() else []


def last_values(path: Path) -> dict[str, float | None]:
    """The last value of every tag of at most two parts; None where it was not finite."""
    values = {tag: value for row in rows_of(path) for tag, value in row.items()}
    return {tag: value for tag, value in values.items() if tag != "step" and tag.count("/") < 2}


def curves(paths: Sequence[Path], tag: str | None) -> bytes:
    """A PNG of ``tag`` over the steps of each run; by default of the score that the first run keeps the best of.

    Between two rows of a run the line is straight.
    """
    import numpy as np
    import torch

    from lightning_custom.events import png_bytes
    from lightning_custom.pictures import curves_picture

    tag = tag or summarise(paths[0]).best_name
    if tag is None:
        raise ConfigError(f"metric: none given, and {paths[0]} keeps no best; give a tag with --metric")
    lines = [_points(path, tag) for path in paths]
    steps = np.unique(np.concatenate([line[0] for line in lines]))
    # A run is not drawn beyond its own rows.
    drawn = [np.interp(steps, *line, left=np.nan, right=np.nan) for line in lines]
    named = {f"{name}  {tag}": torch.from_numpy(y) for name, y in zip(short_names(paths), drawn, strict=True)}
    return png_bytes(curves_picture(torch.from_numpy(steps), named))


def _points(path: Path, tag: str) -> tuple[list[float], list[float]]:
    rows = rows_of(path)
    values = {float(row["step"]): float(row[tag]) for row in rows if row.get(tag) is not None}
    if not values:
        known = sorted({name for row in rows for name in row} - {"step"})
        # A run may have dozens.
        known = difflib.get_close_matches(tag, known, 3) or known
        raise ConfigError(f"metric: {tag!r} is in no row of {path}; there are {', '.join(known) or 'none'}")
    return list(values), list(values.values())
