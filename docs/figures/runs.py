"""Draw curves of runs from their rows of metrics.

    python docs/figures/runs.py curve RUN_DIR --tags val/accuracy train/accuracy --out docs/figures/NAME.png

Several directories are drawn into one axis. A tag that a row does not have is no point; ``--y LOW HIGH`` cuts the axis.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from lightning_custom.metrics import ROWS, read_rows

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""


def points(rows: Sequence[dict[str, Any]], tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have ``tag`` as a number, later rows of a step in place of earlier ones."""
    values = {row["step"]: row[tag] for row in rows if row.get(tag) is not None}
    return list(values), list(values.values())


def curve(
    run_dirs: Sequence[Path], tags: Sequence[str], out: Path, limits: Sequence[float] | None, title: str | None
) -> None:
    """Write a picture of ``tags`` over the steps of each run."""
    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    axis.set_prop_cycle(color=COLOURS)
    for run_dir in run_dirs:
        rows = read_rows(run_dir)
        for tag in tags:
            steps, values = points(rows, tag)
            if not steps:
                known = ", ".join(sorted({name for row in rows for name in row} - {"step"}))
                raise SystemExit(f"tags: {tag!r} is in no row of {run_dir}; there are {known}")
            label = tag if len(run_dirs) == 1 else f"{tag}, {run_dir.name}"
            axis.plot(steps, values, label=label, linewidth=1.4, marker="." if len(steps) < 20 else None)
    axis.set_xlabel("step")
    axis.set_ylim(*(limits or (None, None)))
    axis.set_title(title or "", fontsize=10)
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    options = kinds.add_parser("curve", help="tags over steps")
    options.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    options.add_argument("--tags", nargs="+", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--y", nargs=2, type=float, metavar=("LOW", "HIGH"))
    options.add_argument("--title")
    given = parser.parse_args(words)
    for run_dir in given.run_dirs:
        if not (run_dir / ROWS).exists():
            parser.error(f"RUN_DIR: {run_dir} has no {ROWS}; give a run's directory")
    curve(given.run_dirs, given.tags, given.out, given.y, given.title)


if __name__ == "__main__":
    main()
