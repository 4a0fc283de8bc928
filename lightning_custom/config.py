"""The settings that every run has, which a recipe's own config extends."""

import atexit
import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from lightning.fabric import Fabric

from lightning_custom.distributed import first_process
from lightning_custom.errors import ConfigError
from lightning_custom.replay import MARKER, replay_folder


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that every recipe shares; a recipe adds its own as one flat frozen dataclass."""

    steps: int = 1000
    """Horizon of the run, in steps of the outer loop."""
    stop_at: int | None = None
    """Stop after this step exactly as a signal would: save, leave, resumable."""
    max_time: str | None = None
    """Stop after this time (90s, 1h30m, 01:30:00), as a signal would."""
    seed: int = 0
    """Seed of everything random."""
    run_dir: str | None = None
    """Directory of the run; none: runs/NAME/DATE-TIME."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if run_dir holds a checkpoint; must: fail without one; never: refuse a used run_dir."""
    replay_step: int | None = None
    """Do this step of run_dir again, checking every module, in a copy of the run."""
    log_every: int = 100
    """Steps between two rows of metrics."""
    validate_every: int = 1000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    logger: str | None = None
    """A logger beside TensorBoard: csv, wandb, mlflow, or MODULE.FUNCTION that makes one of the run's directory."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto."""
    devices: int | None = None
    """Processes on each node; none: what the launcher (torchrun, SLURM) says, else 1."""
    num_nodes: int = 1
    """Machines in the run."""
    strategy: str = "auto"
    """auto averages gradients explicitly; ddp and fsdp where the recipe's page says so."""
    precision: str = "32-true"
    """32-true, bf16-mixed, 16-mixed, bf16-true or 64-true."""
    threads: int | None = None
    """CPU threads of each process; none: torch's choice."""
    deterministic: bool = True
    """Deterministic algorithms, with a warning that names an operation without one."""

    def __post_init__(self) -> None:
        require_known_words(self)
        require_at_least(self, _LEAST)
        require_at_most(self, {"seed": 2**63 - 1})


_LEAST = {
    "steps": 0, "stop_at": 1, "seed": 0, "log_every": 0, "validate_every": 0, "checkpoint_every": 0, "keep": 1,
    "devices": 1, "num_nodes": 1, "threads": 1,
}  # fmt: skip


def require_known_words(config: RunConfig) -> None:
    """:class:`ConfigError` for the first field of a ``Literal`` type that is none of its words."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal and getattr(config, field.name) not in get_args(field.type):
            words = ", ".join(map(str, get_args(field.type)))
            raise ConfigError(f"{field.name}: {getattr(config, field.name)!r}; choose one of {words}")


def require_at_least(config: Any, bounds: Mapping[str, float]) -> None:
    """:class:`ConfigError` for the first field of a dataclass below its bound; None is not compared."""
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}: {value}; it must be at least {least}")


def require_at_most(config: RunConfig, bounds: Mapping[str, float]) -> None:
    """:class:`ConfigError` for the first field above its bound."""
    for name, most in bounds.items():
        if getattr(config, name) > most:
            raise ConfigError(f"{name}: {getattr(config, name)}; it must be at most {most}")


def refuse_unread(config: RunConfig, fields: Mapping[str, bool | str]) -> None:
    """:class:`ConfigError` for the first field that was changed, to something else than 0 or none, and has no effect.

    ``fields`` gives for each by name why nothing reads it and the remedy, or something false where it is read. Not for
    what goes with a preset's network or length, which someone may take over and change the rest.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, reason in fields.items():
        value = getattr(config, name)
        if reason and value and value != defaults[name]:
            raise ConfigError(f"{name}: {value}, but {reason}")


INVOCATION_FIELDS = frozenset({"run_dir", "resume", "stop_at", "max_time", "replay_step"})
"""What belongs to one start of the program and not to the run: never stored."""

WAYS_TO_COMPUTE = ("compile", "tasks_at_once", "task_batching", "checkpoint_inner")
"""Fields of recipes that ask for the same numbers in another way, equal to rounding; some need less memory."""

CHANGEABLE_FIELDS = INVOCATION_FIELDS | {
    "log_every", "validate_every", "checkpoint_every", "keep", "logger",
    "accelerator", "devices", "num_nodes", "strategy", "precision", "threads", "deterministic",
    "data_root", "num_workers", "watch_every", "test_tasks", "test_episodes", *WAYS_TO_COMPUTE,
}  # fmt: skip
"""What a resumed run may change; a change of the machine is warned of by the checkpoint's manifest."""

C = TypeVar("C", bound=RunConfig)


def stored_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of ``config`` that ``config.yaml`` holds."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in INVOCATION_FIELDS
    }


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; :class:`ConfigError` names the file and what is wrong with it."""
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}; give a file that exists") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config: {path} is not valid YAML: {reason}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"config: {path} must hold 'name: value' lines, as RUN_DIR/config.yaml does")
    return fields


def check_unchanged(config: RunConfig, stored: dict[str, Any], *, steps_fixed: bool) -> None:
    """Refuse a resumed run whose config differs from the stored one outside :data:`CHANGEABLE_FIELDS`.

    ``steps_fixed`` says that a schedule reads ``steps``, so that changing it would change the past.
    """
    changeable = CHANGEABLE_FIELDS if steps_fixed else CHANGEABLE_FIELDS | {"steps"}
    differences = [
        f"{name} ({stored[name]!r} -> {value!r})"
        for name, value in stored_fields(config).items()
        if name in stored and name not in changeable and stored[name] != _as_stored(value)
    ]
    if differences:
        raise ConfigError(
            f"run_dir: {config.run_dir} holds a run with another config: {', '.join(differences)}; "
            "take the change back, or start afresh with another --run_dir"
        )


def _as_stored(value: Any) -> Any:
    return yaml.safe_load(yaml.safe_dump(value))


def with_run_dir(fabric: Fabric, config: C) -> C:
    """``config`` with a run directory: its own, or ``runs/NAME/DATE-TIME`` decided by process 0.

    With ``replay_step``, a copy of what the run had before that step, where it is done again and logged.
    """
    if config.replay_step is not None:
        return _with_replay_folder(fabric, config, config.replay_step)
    if config.run_dir is not None:
        return config
    if config.resume == "must":
        raise ConfigError("resume: must, but no run is named; give its directory with --run_dir")
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = Path("runs") / recipe_name(type(config)) / now
    return dataclasses.replace(config, run_dir=first_process(fabric, lambda: str(_claim(path))))


def _with_replay_folder(fabric: Fabric, config: C, step: int) -> C:
    if config.run_dir is None:
        raise ConfigError("replay_step: needs the run that it is of; give --run_dir")
    run_dir = Path(config.run_dir)
    if (run_dir / MARKER).exists():
        return config
    if not 1 <= step <= config.steps:
        raise ConfigError(f"replay_step: {step}; the run has steps 1 to {config.steps}")
    folder = first_process(fabric, lambda: str(replay_folder(run_dir, step)))
    return dataclasses.replace(config, run_dir=folder, stop_at=step, log_every=1, checkpoint_every=0, resume="auto")


def _claim(path: Path) -> Path:
    """Create ``path``, or ``path-2``, ``path-3``, ... where it exists already."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            atexit.register(_remove_if_empty, candidate.absolute())
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise ConfigError(
                f"run_dir: cannot create {candidate}: {error.strerror}; choose one with --run_dir"
            ) from error


def _remove_if_empty(folder: Path) -> None:
    """What is left of a start that was refused before it wrote anything."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def recipe_name(kind: type[RunConfig]) -> str:
    """The last word of the module that defines the config (``gan`` for ``recipes.gan``)."""
    module = kind.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        module = spec.name if spec is not None else Path(getattr(main, "__file__", "run")).stem
    return module.rpartition(".")[2]
