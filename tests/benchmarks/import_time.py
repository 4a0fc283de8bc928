"""How long a recipe takes to import, against torch and lightning alone.

    python -m tests.benchmarks.import_time

Each import is that of a fresh interpreter, timed inside it, in seconds of the CPU: on an idle machine those of the
clock, on a busy one less disturbed. Files are in the page cache after the first round.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.interleave import Contender, interleave, machine, table

ROOT = Path(__file__).parents[2]
REFERENCE = "torch, lightning"
TARGET = 1.15
ROUNDS = 9


def fresh_import(names: str) -> Contender:
    """A contender that imports ``names`` in an interpreter of its own."""
    program = f"import time; t = time.process_time(); import {names}; print(time.process_time() - t)"

    def contender() -> float:
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        return float(result.stdout)

    return contender


def recipes() -> list[str]:
    """The names of the recipes' modules."""
    return [f"recipes.{path.stem}" for path in sorted((ROOT / "recipes").glob("*.py")) if path.stem != "__init__"]


def report(names: list[str], rounds: int = ROUNDS) -> str:
    """The table."""
    contenders = {name: fresh_import(name) for name in (REFERENCE, *names)}
    results = interleave(contenders, rounds, targets=dict.fromkeys(names, TARGET))
    return table("import, a step is one", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules; default: every recipe")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    print(report(given.names or recipes(), given.rounds))
    print(machine())
