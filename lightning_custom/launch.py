"""Fabric as the run's config asks for it."""

import os
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators.cpu import CPUAccelerator

from lightning_custom.config import RunConfig
from lightning_custom.distributed import ExplicitStrategy
from lightning_custom.errors import ConfigError
from lightning_custom.freed_memory import keep_freed_memory
from lightning_custom.precision import FullDouble
from lightning_custom.sharded import fully_sharded

# Processes that any CPU can hold, to try something out; more than its cores each want 250 MB and wait for each other.
_FEW = 8
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def launch(config: RunConfig) -> Fabric:
    """A launched Fabric: devices, precision, strategy and determinism as ``config`` says.

    With several processes and ``strategy="auto"``, gradients are averaged explicitly
    (:class:`~lightning_custom.distributed.ExplicitStrategy`). What ``config`` leaves open, torchrun, ``fabric run`` or
    SLURM decide. On a CPU freed memory is kept (:func:`~lightning_custom.freed_memory.keep_freed_memory`).
    """
    strategy = _left_open(config.strategy, "auto", "LT_STRATEGY")
    precision = _left_open(config.precision, "32-true", "LT_PRECISION")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is unknown; use {', '.join(PRECISIONS)}")
    devices = config.devices or _number("LOCAL_WORLD_SIZE") or _number("SLURM_NTASKS_PER_NODE") or 1
    num_nodes = config.num_nodes if config.num_nodes > 1 else _number("GROUP_WORLD_SIZE") or 1
    options: dict[str, Any] = {"strategy": strategy}
    if strategy == "auto" and devices * num_nodes > 1:
        options["strategy"] = ExplicitStrategy()
    elif strategy == "fsdp":
        options["strategy"] = fully_sharded(devices * num_nodes)
    if precision == "64-true":
        options["plugins"] = [FullDouble()]
    else:
        options["precision"] = precision
    if config.devices is not None or "LT_DEVICES" not in os.environ:  # which may name devices: 2,3
        options["devices"] = devices
    make_deterministic(config.deterministic)
    try:
        fabric = Fabric(accelerator=config.accelerator, num_nodes=num_nodes, **options)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"accelerator, devices, strategy, precision: {' '.join(str(error).split())}") from error
    if isinstance(fabric.accelerator, CPUAccelerator) and devices > (most := max(os.cpu_count() or 1, _FEW)):
        raise ConfigError(f"devices: {devices} processes on a CPU of {os.cpu_count()} cores; choose at most {most}")
    if "LT_CLI_USED" not in os.environ:  # fabric run has connected the processes, and Fabric refuses to do it again
        fabric.launch()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def _left_open(value: str, default: str, variable: str) -> str:
    """``value``, or what ``fabric run`` was told instead of the default; Fabric must not see that it was told."""
    told = os.environ.pop(variable, default)
    return told if value == default else value


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None


def make_deterministic(deterministic: bool) -> None:
    """Ask torch for algorithms that give the same bits each time; one without such is named in a warning."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory with NaN finds bugs in code that reads it, at a price in every torch.empty.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
