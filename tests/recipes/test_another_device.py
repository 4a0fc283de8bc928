"""Every recipe, and every variant of it, has on a device that is not the CPU the numbers of the CPU."""

import dataclasses
import importlib
import json
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves

from lightning_custom.state import capture
from lightning_custom.storage import read_manifest
from lightning_custom.testing import largest_difference, single_process
from tests.emulated_device import EmulatedTensor, emulated, moved_back, registered
from tests.forked import Forked
from tests.recipes.cases import CASES

SHORT = {"val_episodes": 2, "test_episodes": 2, "val_tasks": 4, "test_tasks": 4, "learning_starts": 0} | {
    "val_attack_steps": 2, "test_attack_steps": 2, "test_restarts": 1, "test_queries": 2,
}  # fmt: skip
# Computed again by autograd's thread of the device, in which the emulation aborts.
NOT_EMULATED = {("maml", "recomputed")}
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch knows no devices written in Python",
    ),
]


def first_steps(case, config, fabric, run_dir, *, resumed):
    """The state after two steps, with rows, scores and checkpoints; ``resumed`` from the first."""
    config = dataclasses.replace(config, run_dir=run_dir, log_every=2, validate_every=2, checkpoint_every=2)
    if resumed:
        case.run(fabric, dataclasses.replace(config, stop_at=1))
    return capture(case.run(fabric, dataclasses.replace(config, stop_at=2)))


def emulated_variants(case):
    return {name: config for name, config in case.configs().items() if (case.name, name) not in NOT_EMULATED}


def compare(name, folder):
    """Writes, for each variant, how far it ends from the CPU's run, or what went wrong."""
    registered()
    warnings.simplefilter("error")
    (case,) = [case for case in CASES if case.name == name]
    found = {}
    for variant, config in emulated_variants(case).items():
        try:
            resumed = variant == "default"
            expected = first_steps(case, config, single_process("64-true"), f"{folder}/cpu/{variant}", resumed=resumed)
            with emulated() as fabric:
                state = first_steps(case, config, fabric, f"{folder}/device/{variant}", resumed=resumed)
            assert any(isinstance(leaf, EmulatedTensor) for leaf in tree_leaves(state)), "nothing is on the device"
            found[variant] = largest_difference(expected, moved_back(state))
        except Exception as error:
            found[variant] = f"{type(error).__name__}: {error}"
    Path(folder, "found.json").write_text(json.dumps(found))
    return 0


def run_main(name, folder):
    """Two steps of the default preset, with what comes before and after: data, scores, the test at the end."""
    registered()
    (case,) = [case for case in CASES if case.name == name]
    short = {field: value for field, value in SHORT.items() if hasattr(case.preset, field)}
    config = dataclasses.replace(case.preset, steps=2, stop_at=None, run_dir=folder, **short)
    recipe = importlib.import_module(case.module)
    with emulated() as fabric, patch.object(recipe, "launch", lambda _: fabric):
        recipe.main(config)
    return 0


def refusals(folder):
    """What the emulation refuses, by name."""
    registered()
    attempts = {
        "a sum of both": lambda there: there + torch.ones(3),
        "a number of the CPU": lambda there: there + torch.tensor(1.0),
        "NumPy": lambda there: there.numpy(),
        "moved": lambda there: (there.cpu() + torch.ones(3)).numpy(),
    }
    refused = {}
    with emulated() as fabric:
        for name, attempt in attempts.items():
            try:
                attempt(torch.zeros(3, device=fabric.device))
            except RuntimeError as error:
                refused[name] = str(error)
    Path(folder, "refused.json").write_text(json.dumps(refused))
    return 0


def test_the_emulated_device_refuses_what_a_gpu_refuses(tmp_path):
    with Forked(tmp_path / "log.txt", refusals, str(tmp_path)) as forked:
        assert forked.status() == 0, forked.text()
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused.keys() == {"a sum of both", "NumPy"}
    assert "tensors of the CPU and of another device" in refused["a sum of both"]


@every_case
def test_the_default_preset_runs_to_its_end_on_another_device(case, tmp_path):
    with Forked(tmp_path / "log.txt", run_main, case.name, str(tmp_path / "run")) as forked:
        assert forked.status(280) == 0, forked.text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert manifest["machine"]["device"].startswith("emulated ")


@every_case
def test_on_another_device_every_variant_has_the_numbers_of_the_cpu(case, tmp_path):
    with Forked(tmp_path / "log.txt", compare, case.name, str(tmp_path)) as forked:
        assert forked.status(280) == 0, forked.text()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == emulated_variants(case).keys()
    assert {name: value for name, value in found.items() if isinstance(value, str) or value > 1e-9} == {}
