"""Recipes as programs, started as a user would."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from tests.forked import Forked

ROOT = Path(__file__).parents[2]


def start(recipe, *flags, environment=None, **options):
    """``python -m recipes.RECIPE FLAGS`` in the checkout, its output piped as text."""
    return subprocess.Popen(
        [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    """(status, what it printed, what it said of errors) of a program that ends by itself."""
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


def fork(recipe, *flags, log):
    """The same without the seconds that imports take, its output in the file ``log``."""
    return Forked(log, _run_as_main, recipe, [*map(str, flags)])


def _run_as_main(recipe, words):
    sys.argv = [recipe, *words]
    runpy.run_module(f"recipes.{recipe}", run_name="__main__", alter_sys=True)  # which ends by sys.exit
