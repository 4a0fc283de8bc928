"""Recipes as subprocesses, started as a user would."""

import os
import subprocess
import sys
from pathlib import Path

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
