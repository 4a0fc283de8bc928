"""A network of a run as one safetensors file, which any program can read, with the run's config in its header."""

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_custom import __version__, storage
from lightning_custom.checkpoint import load_module, read_best
from lightning_custom.config import read_config
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.run import CHECKPOINTS, CONFIG

_COUNT = "n_averaged"


def export(run_dir: Path, out: Path, *, which: Literal["best", "last"] = "best", module: str | None = None) -> str:
    """Write the weights of a part of a run's best (or last) checkpoint to ``out``; return the part's name.

    ``module`` is a field of the state, or FIELD.KEY of one that is a dict; by default its average of weights, else
    ``model``. The file's metadata holds ``config`` (JSON), ``module``, ``step`` and ``version``. Tensors that share
    memory are written each on its own.
    """
    try:
        save_file = importlib.import_module("safetensors.torch").save_file
    except ImportError as error:
        raise ConfigError("export: needs safetensors, which is not installed; pip install safetensors") from error
    name, weights = _weights(run_dir, which, module)
    metadata = {
        "format": "pt",
        "config": json.dumps(read_config(run_dir / CONFIG)),
        "module": name,
        "step": str(_step(run_dir, which)),
        "version": __version__,
    }
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.clone().contiguous() for key, value in weights.items()}, temporary, metadata)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"out: cannot write {out}: {error.strerror or error}; choose another --out") from error
    return name


def _weights(run_dir: Path, which: Literal["best", "last"], module: str | None) -> tuple[str, dict[str, Tensor]]:
    if module is None:
        with suppress(CheckpointError):  # which the next lines say, if it is not about the name
            return "average", _plain_weights("average", load_module(run_dir, "average", which=which))
        module = "model"
    return module, _plain_weights(module, load_module(run_dir, module, which=which))


def _plain_weights(name: str, part: dict[str, Any]) -> dict[str, Tensor]:
    if not all(isinstance(value, Tensor) for value in part.values()):
        raise ConfigError(f"module: {name!r} is not a network; name a field of the state that is one")
    if _COUNT in part:  # torch's AveragedModel: the network's own names are behind a prefix
        part = {key.removeprefix("module."): value for key, value in part.items() if key != _COUNT}
    return part


def _step(run_dir: Path, which: Literal["best", "last"]) -> int:
    best = read_best(run_dir) if which == "best" else None
    return int(best["step"]) if best else storage.saved_steps(run_dir / CHECKPOINTS)[-1]
