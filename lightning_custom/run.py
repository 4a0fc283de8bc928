"""A run directory: who owns it, what its status is, and with which config it began."""

import dataclasses
import json
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

import yaml

from lightning_custom import storage
from lightning_custom.config import C, RunConfig, read_config, recipe_name, stored_fields
from lightning_custom.errors import ConfigError
from lightning_custom.events import PATTERN
from lightning_custom.metrics import ROWS

CONFIG, STATUS, LOCK, CHECKPOINTS = "config.yaml", "status.json", ".lock", "checkpoints"


def config_of_run(kind: type[C], run_dir: str, **changes: Any) -> C:
    """The config that a run began with, of its recipe's ``kind``, but for ``changes``.

    :class:`ConfigError` where ``run_dir`` holds no run, or one of another recipe.
    """
    if not (Path(run_dir) / CONFIG).exists():
        raise ConfigError(f"run_dir: {run_dir} holds no run; check the path")
    return kind(**fields_of_run(kind, run_dir) | changes)


def fields_of_run(kind: type[RunConfig], run_dir: str | Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` holds; :class:`ConfigError` where ``kind`` is not the config of its recipe."""
    fields = read_config(Path(run_dir) / CONFIG)
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})
    if not unknown:
        return fields
    status = read_status(run_dir) if (Path(run_dir) / STATUS).exists() else {"recipe": None}
    if status["recipe"] not in (None, recipe_name(kind)):
        raise ConfigError(
            f"run_dir: {run_dir} holds a run of {status['recipe']}, not of {recipe_name(kind)}; check the path, or go "
            f"on with: {status['command']}"
        )
    raise ConfigError(
        f"run_dir: {run_dir} holds a run with {', '.join(unknown)}, which {kind.__name__} has not; check the path, or "
        "go on with the version of the program that began it"
    )


def stopped_line(run_dir: str | Path) -> str | None:
    """What a program that a signal, a time limit or ``stop_at`` ended prints last; None where the run is complete."""
    status = read_status(run_dir)
    if status["state"] != "stopped":
        return None
    return f"stopped after step {status['step']} of {status['steps']}, saved; go on with: {status['command']}"


def complete_already(config: RunConfig, step: int, *, steps_fixed: bool) -> str:
    """What a start of a run that had nothing left to do prints; ``steps_fixed`` as ``Checkpointer`` has it."""
    longer = (
        "its schedule ends there, so a longer run needs another --run_dir"
        if steps_fixed
        else "a larger --steps goes on"
    )
    return f"run: {config.run_dir} was complete already, at step {step}; {longer}"


class Run:
    """The run directory of one process group, held by process 0 from :meth:`open` to :meth:`close`."""

    def __init__(self, config: RunConfig) -> None:
        assert config.run_dir is not None
        self.path = Path(config.run_dir)
        self.checkpoints = self.path / CHECKPOINTS
        self._config = config
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Create the directory, take its lock, and sweep what an interrupted save left."""
        holds_run = (self.path / CONFIG).exists()
        if self._config.resume == "never" and holds_run:
            raise ConfigError(f"resume: never, but {self.path} holds a run; choose another --run_dir or --resume auto")
        if self._config.resume == "must" and not storage.saved_steps(self.checkpoints):
            raise ConfigError(
                f"resume: must, but {self.path} holds no checkpoint; check --run_dir, or start with --resume auto"
            )
        if not holds_run:
            self._refuse_strange_files()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a+")
        except OSError as error:
            raise ConfigError(
                f"run_dir: cannot write to {self.path} ({error.strerror}); choose another with --run_dir"
            ) from error
        self._take_lock(self._lock)
        self._lock.truncate(0)
        self._lock.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
        self._lock.flush()
        os.fsync(self._lock.fileno())  # process 0 of another node may read it over a network
        storage.sweep(self.path)
        storage.sweep(self.checkpoints)

    def _refuse_strange_files(self) -> None:
        """:class:`ConfigError` where a fresh run would write over what another program has logged."""
        strange = sorted(path.name for pattern in (PATTERN, ROWS) for path in self.path.glob(pattern))
        if strange:
            raise ConfigError(
                f"run_dir: {self.path} holds {strange[0]} and no run of ours, and would lose it; choose another with "
                "--run_dir"
            )

    def _take_lock(self, file: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nothing frees a lock at kill -9 there
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            owner = self.owner() or "an unknown process"
            raise ConfigError(
                f"run_dir: {self.path} is in use by {owner}; wait for it, stop it, or choose another --run_dir"
            ) from error
        # A forked worker that outlives a killed parent would keep the lock.
        os.register_at_fork(after_in_child=file.close)

    def owner(self) -> str:
        """What the lock file says of the process group that holds it; empty where there is none to read."""
        try:
            return (self.path / LOCK).read_text().strip()
        except OSError:
            return ""

    def close(self) -> None:
        """Free the lock; the file stays, since deleting it would free a lock that others wait for."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stored_config(self) -> dict[str, Any] | None:
        """What ``config.yaml`` holds, or None in a directory without one."""
        path = self.path / CONFIG
        return read_config(path) if path.exists() else None

    def store_config(self) -> None:
        """Write ``config.yaml``: enough to start a fresh run like this one."""
        text = yaml.safe_dump(stored_fields(self._config), sort_keys=False)
        storage.write_atomically(self.path / CONFIG, text)
        storage.fsync_folder(self.path)

    def write_status(self, state: str, step: int, *, signal: int | None = None, error: str | None = None) -> None:
        """Replace ``status.json``; ``state`` is running, stopped, complete or failed."""
        status = {
            "state": state,
            "step": step,
            "steps": self._config.steps,
            "signal": signal,
            "error": error,
            "recipe": recipe_name(type(self._config)),
            "command": resume_command(self.path),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        storage.write_atomically(self.path / STATUS, json.dumps(status, indent=1) + "\n")


def resume_command(run_dir: Path) -> str:
    """The shell command that goes on with a run of the program that is running now."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        program = [getattr(main, "__file__", None) or "-"]
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([python, *program, "--run_dir", str(run_dir)])


def read_status(run_dir: str | Path) -> dict[str, Any]:
    """What ``status.json`` holds."""
    content: dict[str, Any] = json.loads((Path(run_dir) / STATUS).read_text())
    return content


def exit_status(run_dir: str | Path) -> int:
    """What a finished run's program should return: 0, or 128 plus the number of the signal that stopped it."""
    status = read_status(run_dir)
    return 128 + status["signal"] if status["state"] == "stopped" and status["signal"] else 0
