"""Fabric as the run's config asks for it."""

import os
from typing import Any

import torch
from lightning.fabric import Fabric

from lightning_custom.config import RunConfig
from lightning_custom.distributed import ExplicitStrategy
from lightning_custom.errors import ConfigError
from lightning_custom.precision import FullDouble
from lightning_custom.sharded import fully_sharded

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def launch(config: RunConfig) -> Fabric:
    """A launched Fabric: devices, precision, strategy and determinism as ``config`` says.

    With several processes and ``strategy="auto"``, gradients are averaged explicitly
    (:class:`~lightning_custom.distributed.ExplicitStrategy`). Inside torchrun or SLURM the launcher's number of
    processes holds where ``devices`` is None.
    """
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision: {config.precision!r} is unknown; use {', '.join(PRECISIONS)}")
    devices = config.devices if config.devices is not None else _launcher_devices()
    options: dict[str, Any] = {"strategy": config.strategy}
    if config.strategy == "auto" and devices * config.num_nodes > 1:
        options["strategy"] = ExplicitStrategy()
    elif config.strategy == "fsdp":
        options["strategy"] = fully_sharded(devices * config.num_nodes)
    if config.precision == "64-true":
        options["plugins"] = [FullDouble()]
    else:
        options["precision"] = config.precision
    make_deterministic(config.deterministic)
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=devices, num_nodes=config.num_nodes, **options)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"accelerator, devices, strategy, precision: {' '.join(str(error).split())}") from error
    fabric.launch()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return fabric


def _launcher_devices() -> int:
    for name in ("LT_DEVICES", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def make_deterministic(deterministic: bool) -> None:
    """Ask torch for algorithms that give the same bits each time; one without such is named in a warning."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory with NaN finds bugs in code that reads it, at a price in every torch.empty.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
