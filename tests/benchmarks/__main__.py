"""Every side-by-side comparison, each in a process of its own: one table of what ran, and what each printed.

    python -m tests.benchmarks                                   # all; the better part of an hour on an idle machine
    python -m tests.benchmarks --list
    python -m tests.benchmarks --only layer_overhead maml_step
    python -m tests.benchmarks --out docs/benchmarks/2026-11-27.md

A comparison is a module of this folder with a function ``report``. Peers come with ``pip install -e '.[peers]'``; one
that is not installed is left out and named.
"""

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.interleave import machine

FOLDER = Path(__file__).parent
PEERS = {
    "classification_step": ("lightning", "accelerate"),
    "maml_step": ("higher", "torchopt"),
    "multitask_step": ("torchjd", "LibMTL"),
    "ppo_speed": ("stable-baselines3",),
    "ppo_variants_speed": ("stable-baselines3", "sb3-contrib"),
    "value_speed": ("stable-baselines3",),
}
"""The distributions that a comparison has beside it; the others compare with raw PyTorch."""


@dataclass(frozen=True)
class Reading:
    """What a comparison printed, and how it ended."""

    name: str
    status: int
    seconds: float
    text: str


def suites() -> list[str]:
    """The names of the comparisons."""
    files = sorted(FOLDER.glob("*.py"))
    return [file.stem for file in files if "\ndef report(" in file.read_text() and not file.stem.startswith("test_")]


def version(distribution: str) -> str:
    """The installed version of a distribution, or that it is missing."""
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} not installed"


def read(name: str) -> Reading:
    """Run a comparison and show what it prints as it comes."""
    started, lines = time.monotonic(), []
    command = [sys.executable, "-m", f"tests.benchmarks.{name}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    folder = FOLDER.parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return Reading(name, process.returncode, time.monotonic() - started, "".join(lines))


def summary(readings: Sequence[Reading]) -> str:
    """A Markdown table: comparison, peers with versions, time, and whether it came to its end."""
    lines = ["| comparison | beside it | time | |", "|---|---|---|---|"]
    for reading in readings:
        peers = ", ".join(map(version, PEERS.get(reading.name, ()))) or "raw PyTorch"
        ended = "" if reading.status == 0 else f"failed, status {reading.status}"
        lines.append(f"| `{reading.name}` | {peers} | {reading.seconds:.0f} s | {ended} |")
    return "\n".join(lines)


def page(readings: Sequence[Reading], date: str) -> str:
    """A page for ``docs/benchmarks``."""
    parts = [f"# Reading of {date}", machine(), summary(readings)]
    for reading in readings:
        parts += [
            f"## {reading.name}", f"```console\npython -m tests.benchmarks.{reading.name}\n```",
            f"```text\n{reading.text.rstrip()}\n```",
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a comparison failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = suites()
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=known, default=known, help=", ".join(known))
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write all of it as a page")
    parser.add_argument("--list", action="store_true", help="say what there is, with peers and versions, and leave")
    given = parser.parse_args(words)
    if given.list:
        for name in known:
            print(f"{name:<22} {', '.join(map(version, PEERS.get(name, ()))) or 'raw PyTorch'}")
        return 0
    readings = []
    for name in given.only:
        print(f"\n== {name}", flush=True)
        readings.append(read(name))
    print(f"\n{summary(readings)}\n\n{machine()}")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(page(readings, datetime.date.today().isoformat()))
    return int(any(reading.status for reading in readings))


if __name__ == "__main__":
    sys.exit(main())
