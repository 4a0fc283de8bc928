"""Look at runs, compare them, and take a network out of one: ``python -m lightning_custom runs``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_custom import runs
from lightning_custom.errors import CheckpointError, ConfigError

_WRONG_USAGE = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lightning_custom", description="What runs there are, and how they differ.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    listed = verbs.add_parser("runs", help="list runs", description="List the runs under a directory, at any depth.")
    listed.add_argument("dir", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    listed.set_defaults(action=_list)
    compared = verbs.add_parser(
        "compare",
        help="compare runs",
        description="The settings in which runs differ, and the last value of every tag.",
    )
    compared.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    compared.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a tag of each run into a picture")
    compared.add_argument("--metric", metavar="TAG", help="what to draw; default: what the first run keeps the best of")
    compared.set_defaults(action=_compare)
    exported = verbs.add_parser(
        "export", help="write a network as safetensors", description="Write a network of a run as a safetensors file."
    )
    exported.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    exported.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write")
    exported.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint; default: best")
    exported.add_argument("--module", metavar="NAME", help="field of the state; default: average, else model")
    exported.set_defaults(action=_export)
    return parser


def _list(given: argparse.Namespace) -> None:
    found = runs.find_runs(given.dir)
    print(runs.listing(found) if found else f"no runs under {given.dir}")


def _compare(given: argparse.Namespace) -> None:
    if given.metric and not given.plot:
        raise ConfigError("metric: is for a picture; give --plot FILE.png too")
    if len(given.runs) < 2:
        raise ConfigError(f"RUN: only {given.runs[0]}; give two runs or more")
    text = runs.comparison(given.runs)
    if given.plot:
        picture = runs.curves(given.runs, given.metric)
        try:
            given.plot.write_bytes(picture)
        except OSError as error:
            raise ConfigError(f"plot: cannot write {given.plot}: {error.strerror}; choose another file") from error
    print(text)


def _export(given: argparse.Namespace) -> None:
    from lightning_custom.export import export

    name = export(given.run, given.out, which=given.which, module=given.module)
    print(f"{name} of {given.run}: {given.out}")


def main(words: Sequence[str] | None = None) -> int:
    """Do what ``words`` (``sys.argv``) say and return the exit status: 2, and one line, for what the user can mend."""
    try:
        given = _parser().parse_args(words)
        given.action(given)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _WRONG_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
