"""A logger of Fabric's beside TensorBoard and ``metrics.jsonl``, by name: ``--logger csv``, ``wandb``, ``mlflow``."""

import importlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_custom.errors import ConfigError
from lightning_custom.storage import write_atomically

MakeLogger = Callable[[Path], Any]
"""From a run's directory to a logger with Fabric's methods ``log_metrics``, ``log_hyperparams`` and ``finalize``."""

IDS = "logger.json"
"""In a run's directory: under which id a server knows the run, so that a resumed one goes on there."""


def find_logger(name: str) -> MakeLogger:
    """What makes the logger called ``name``: ``csv``, ``wandb``, ``mlflow`` or MODULE.FUNCTION, a :data:`MakeLogger`.

    :class:`ConfigError` for what cannot be imported; nothing is started yet.
    """
    package, make = _KNOWN.get(name, (name.rpartition(".")[0], None))
    if not package:
        raise ConfigError(f"logger: {name!r} is unknown; use {', '.join(_KNOWN)}, or MODULE.FUNCTION")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        remedy = f"pip install {package}" if make else "check the name"
        raise ConfigError(f"logger: {name} needs {package}, which cannot be imported ({error}); {remedy}") from error
    found: MakeLogger | None = make or getattr(module, name.rpartition(".")[2], None)
    if found is None:
        raise ConfigError(f"logger: {package} has no {name.rpartition('.')[2]}; name a function of the run's directory")
    return found


def _csv(run_dir: Path) -> Any:
    """``csv/version_K/metrics.csv``, K counting the starts of the run."""
    from lightning.fabric.loggers.csv_logs import CSVLogger

    return CSVLogger(run_dir, name="csv", flush_logs_every_n_steps=1)


def _wandb(run_dir: Path) -> Any:
    """One run of Weights & Biases for a run's directory."""
    from lightning.pytorch.loggers import WandbLogger

    known = _remembered(run_dir, "wandb") or uuid.uuid4().hex[:12]
    _remember(run_dir, "wandb", known)
    project = os.environ.get("WANDB_PROJECT", "lightning_custom")
    return WandbLogger(project=project, name=run_dir.name, save_dir=run_dir, id=known)


def _mlflow(run_dir: Path) -> Any:
    """One run of MLflow for a run's directory, on the server of MLFLOW_TRACKING_URI, else in ``mlflow.db``."""
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "lightning_custom"),
        run_name=run_dir.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),
        run_id=_remembered(run_dir, "mlflow"),
    )
    _remember(run_dir, "mlflow", str(logger.run_id))
    return logger


_KNOWN: dict[str, tuple[str, MakeLogger]] = {
    "csv": ("lightning.fabric.loggers", _csv), "wandb": ("wandb", _wandb), "mlflow": ("mlflow", _mlflow),
}  # fmt: skip


def end_logger(logger: Any, status: str) -> None:
    """Tell a logger that the run ends with ``status``, success or failed; a later run must not go on in it."""
    logger.finalize(status)
    finish = getattr(getattr(logger, "experiment", None), "finish", None)  # Weights & Biases' run
    if finish is not None:
        finish(exit_code=0 if status == "success" else 1)


def _ids(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / IDS).read_text()) if (run_dir / IDS).exists() else {}


def _remembered(run_dir: Path, name: str) -> str | None:
    return _ids(run_dir).get(name)


def _remember(run_dir: Path, name: str, known: str) -> None:
    write_atomically(run_dir / IDS, json.dumps({**_ids(run_dir), name: known}) + "\n")
