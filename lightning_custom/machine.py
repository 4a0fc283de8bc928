"""What a machine brings to a run's last bits: versions, devices, threads, processes."""

import platform
from typing import Any

import lightning
import torch
from lightning.fabric import Fabric

from lightning_custom.config import WAYS_TO_COMPUTE, RunConfig


def machine_facts(fabric: Fabric, config: RunConfig) -> dict[str, Any]:
    """The facts that a checkpoint's manifest holds; where one differs, a resumed run may differ in its last bits."""
    device = fabric.device
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{device.type} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": fabric.world_size,
        "precision": config.precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{name: getattr(config, name) for name in WAYS_TO_COMPUTE if hasattr(config, name)},
    }


def differences(stored: dict[str, Any], live: dict[str, Any]) -> list[str]:
    """Which facts differ, as ``name: stored -> live``."""
    return [
        f"{name}: {stored[name]} -> {value}" for name, value in live.items() if name in stored and stored[name] != value
    ]
