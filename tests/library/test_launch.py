"""Fabric as a config and the launcher ask for it; several processes are started in the tests of the recipes."""

import pytest
import torch
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

from lightning_custom.config import RunConfig
from lightning_custom.errors import ConfigError
from lightning_custom.launch import PRECISIONS, launch


def config(**fields):
    return RunConfig(accelerator="cpu", **fields)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "16-mixed"])
def test_one_process_has_the_precision_asked_for(precision):
    fabric = launch(config(precision=precision))
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert isinstance(fabric.strategy, SingleDeviceStrategy)
    assert fabric.setup_module(torch.nn.Linear(1, 1)).weight.dtype == dtype
    autocast = {"bf16-mixed": torch.bfloat16}.get(precision, dtype)
    with fabric.autocast():
        assert (torch.ones(1, 1, dtype=dtype) @ torch.ones(1, 1, dtype=dtype)).dtype == autocast


def test_fabric_run_decides_what_the_config_leaves_open_and_no_more(monkeypatch):
    monkeypatch.setenv("LT_PRECISION", "bf16-true")
    assert launch(config()).setup_module(torch.nn.Linear(1, 1)).weight.dtype == torch.bfloat16
    monkeypatch.setenv("LT_PRECISION", "bf16-true")
    assert launch(config(precision="64-true")).setup_module(torch.nn.Linear(1, 1)).weight.dtype == torch.float64


def test_on_a_cpu_freed_memory_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr("lightning_custom.launch.keep_freed_memory", lambda: calls.append(1))
    launch(config())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"precision": "8-bit"}, "precision: '8-bit' is unknown; use 32-true, "),
        ({"strategy": "nonsense"}, "accelerator, devices, strategy, precision: .*nonsense"),
        ({"devices": 9999}, r"devices: 9999 processes on a CPU of \d+ cores; choose at most \d+"),
    ],
)
def test_what_cannot_be_launched_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        launch(config(**fields))


def test_threads_and_determinism_are_set():
    before = torch.get_num_threads()
    launch(config(threads=2, deterministic=False))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, False)
    launch(config(threads=before))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (before, True)
