import json
import subprocess
import sys

import pytest

from tests.benchmarks.import_time import ROOT, fresh_import, recipes

PROGRAM = """
import json, sys
import torch, lightning
before = set(sys.modules)
for name in {names}:
    __import__(name)
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
LATE = {"matplotlib", "mujoco", "pandas", "safetensors", "scipy", "sklearn", "torchvision"}
"""What takes long to import and is not what every run needs."""


def brought_by(*names):
    """The packages that the modules import beside torch and lightning."""
    command = [sys.executable, "-c", PROGRAM.format(names=list(names))]
    return set(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))


@pytest.mark.slow
def test_recipes_bring_nothing_that_not_every_run_needs():
    found = brought_by(*recipes())
    assert "recipes" in found
    assert not found & LATE


def test_an_import_is_timed_in_its_own_interpreter():
    assert 0.2 < fresh_import("time; sum(iter(lambda: time.process_time() < t + 0.2, False))")() < 2
    with pytest.raises(subprocess.CalledProcessError):
        fresh_import("nothing_of_this_name")()
