"""Checkpoints that a loop saves and resumes from, to the bit."""

import json
import shutil
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from lightning.fabric import Fabric

from lightning_custom import state as states
from lightning_custom import storage
from lightning_custom.config import RunConfig, check_unchanged
from lightning_custom.distributed import all_objects, first_process, together
from lightning_custom.errors import CheckpointError, ConfigError, NonFiniteError
from lightning_custom.loop import due, parse_duration
from lightning_custom.machine import differences, machine_facts
from lightning_custom.precision import unwrap
from lightning_custom.replay import FiniteGuard
from lightning_custom.run import Run
from lightning_custom.sharded import local_part
from lightning_custom.stopping import Stopper

SHARED_FILE = "state.pt"
PRECISION_KEY = "precision_plugin"
_WORDS: dict[Literal["min", "max"], tuple[str, ...]] = {
    "min": ("loss", "error"),
    "max": ("accuracy", "precision", "recall", "f1", "return", "delta_m"),
}


class Checkpointer:
    """A run's checkpoints, its lock, its status and its stop requests, for the length of a ``with`` block.

        with Checkpointer(fabric, config, best="val/fid", mode="min") as checkpointer:
            checkpointer.restore(state)
            while state.step < config.steps:
                ...
                if checkpointer.due(state.step) or checkpointer.is_best(scores):
                    checkpointer.save(state, scores)
                if checkpointer.stop_requested:
                    break

    ``config`` needs a ``run_dir`` (see :func:`~lightning_custom.config.with_run_dir`). ``best`` names the score
    whose best checkpoint is kept beside the newest ``config.keep``; ``mode`` may be auto for scores that
    :func:`mode_of` knows. ``steps_fixed`` says that a schedule reads ``config.steps``, which a resumed run may then not
    change. :meth:`due` is called once a step, on all processes.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: RunConfig,
        *,
        best: str | None = None,
        mode: Literal["auto", "min", "max"] = "min",
        steps_fixed: bool = False,
    ) -> None:
        if config.run_dir is None:
            raise ConfigError("run_dir: none; give one, or call with_run_dir(fabric, config) first")
        self.stop_requested = False
        """Whether the loop should leave after this step: a signal, the time limit or ``stop_at``."""
        self._fabric = fabric
        self._config = config
        self._best_name, self._mode = best, mode_of(best or "") if mode == "auto" else mode
        self._best_value: float | None = None
        self._steps_fixed = steps_fixed
        self._guard: FiniteGuard | None = None
        self._state: Any = None
        self._run = Run(config)
        self._is_first = fabric.global_rank == 0
        self._step = 0
        self._max_seconds = None if config.max_time is None else parse_duration(config.max_time)

    def __enter__(self) -> Self:
        """Take the run's lock and install the signal handlers."""
        try:
            first_process(self._fabric, self._run.open)
            self._check_directory_is_shared()
            first_process(self._fabric, self._check_config)
            self._stopper = Stopper(self._fabric, self._max_seconds)
        except BaseException:
            self._run.close()
            raise
        return self

    def _check_directory_is_shared(self) -> None:
        owner, *seen = all_objects(self._fabric, self._run.owner())
        strangers = [rank for rank, name in enumerate(seen, start=1) if name != owner]
        if strangers:
            raise ConfigError(
                f"run_dir: {self._run.path} is not the same directory for processes 0 and {strangers[0]}; "
                "with several nodes it must lie on a shared file system"
            )

    def _check_config(self) -> None:
        stored, saved = self._run.stored_config(), storage.saved_steps(self._run.checkpoints)
        if stored is not None and saved:
            check_unchanged(self._config, stored, steps_fixed=self._steps_fixed)
            self._check_horizon(saved[-1])

    def restore(self, state: Any) -> None:
        """Fill ``state`` from the newest good checkpoint; without one, mark the beginning of a fresh run.

        A checkpoint that is damaged is set aside with a warning and the one before it is used; if none is good,
        :class:`CheckpointError` says which and why. One that does not fit ``state`` is an error and stays where it
        is. Nothing is written into ``state`` before all of it has been read and checked.
        """
        folder = first_process(self._fabric, self._newest_good)
        if folder is None:
            first_process(self._fabric, self._run.store_config)
        else:
            stored, items, manifest = together(self._fabric, lambda: self._read(folder, state))
            together(self._fabric, lambda: states.restore_(state, stored, items))
            self._restore_precision(stored)
            self._warn_of_another_machine(manifest)
            first_process(self._fabric, self._run.store_config)
        self._step, self._state = state.step, state
        if self._config.replay_step is not None:
            self._guard = FiniteGuard(states.modules(state))
        together(self._fabric, lambda: _resume_parts(state, None if folder is None else state.step))
        self._best_value = first_process(self._fabric, self._write_best)
        self._keep_segments(state)
        first_process(self._fabric, lambda: self._write_status("running"))

    def _check_horizon(self, step: int) -> None:
        """Before anything is written: a run that is further on must not be called stopped or shorter."""
        steps, stop_at = self._config.steps, self._config.stop_at
        if steps < step:
            raise ConfigError(f"steps: {steps}, but the run is at {step} already; give at least as many")
        if stop_at is not None and stop_at <= step < steps:
            raise ConfigError(
                f"stop_at: {stop_at}, but the run is at {step} already; give a later step, or leave it out"
            )

    def _newest_good(self) -> Path | None:
        root, failures = self._run.checkpoints, []
        for step in reversed(storage.saved_steps(root)):
            folder = storage.step_folder(root, step)
            try:
                manifest = storage.verify(folder, run_dir=self._run.path)
                for name in manifest["files"]:
                    storage.read_tensors(folder / name)
            except CheckpointError as error:
                failures.append(_set_aside(folder, error))
            else:
                return folder
        if failures:
            raise CheckpointError(f"no usable checkpoint in {root}: {'; '.join(failures)}")
        # Set aside by an earlier start: what they were of must not begin anew unasked.
        if damaged := sorted(path.name for path in root.glob("step-*.bad*")):
            raise CheckpointError(
                f"no usable checkpoint in {root}: {', '.join(damaged)} are damaged; delete them to begin afresh, or "
                "choose another --run_dir"
            )
        return None

    def _read(self, folder: Path, state: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
        manifest = storage.read_manifest(folder)
        stored = storage.read_tensors(folder / SHARED_FILE)
        stored_precision = stored.pop(PRECISION_KEY, {})
        items: dict[str, dict[str, Any]] = {}
        for name in sorted(manifest["files"]):
            if name != SHARED_FILE:
                for component, content in storage.read_tensors(folder / name).items():
                    items.setdefault(component, {}).update(content)
        problems = states.mismatches(state, stored, items)
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointError(
                f"{folder} does not fit this state: {shown}. Use the networks and optimizers that it was saved with, "
                "or another --run_dir"
            )
        return {**stored, PRECISION_KEY: stored_precision}, items, manifest

    def _restore_precision(self, stored: dict[str, Any]) -> None:
        if stored[PRECISION_KEY]:
            self._fabric.strategy.precision.load_state_dict(stored[PRECISION_KEY])

    def _warn_of_another_machine(self, manifest: dict[str, Any]) -> None:
        changes = differences(manifest.get("machine", {}), machine_facts(self._fabric, self._config))
        if changes and self._is_first:
            warnings.warn(f"the run goes on, but not to the last bit: {', '.join(changes)}", stacklevel=3)

    def due(self, step: int) -> bool:
        """Whether to save after ``step``: every ``checkpoint_every`` steps, after the last, or to stop."""
        self._step = step
        stop = self._stopper.poll() != 0 or (self._config.stop_at is not None and step >= self._config.stop_at)
        self.stop_requested = stop and step < self._config.steps
        return self.stop_requested or due(step, self._config.checkpoint_every, last=self._config.steps)

    def is_best(self, scores: dict[str, float]) -> bool:
        """Whether ``scores`` has the ``best`` score and it beats every checkpoint that exists."""
        value = scores.get(self._best_name or "")
        if value is None or value != value:
            return False
        if self._best_value is None:
            return True
        return value < self._best_value if self._mode == "min" else value > self._best_value

    def save(self, state: Any, scores: dict[str, float] | None = None) -> Path:
        """Write a checkpoint of ``state``, with ``scores`` in its manifest; when this returns it is on the disk.

        Every process calls it. If any fails, :class:`CheckpointError` is raised on all, and what was saved before
        is untouched.
        """
        root, step, scores = self._run.checkpoints, state.step, scores or {}
        self._require_finite(state)
        temporary = storage.temporary_folder(root, step)
        started = time.perf_counter()
        try:
            first_process(self._fabric, lambda: _fresh_folder(temporary))
            written = together(self._fabric, lambda: self._write_parts(temporary, state))
            parts = all_objects(self._fabric, written)
            manifest = {
                "files": {name: facts for files, _ in parts for name, facts in files.items()},
                "segments": {name: facts for _, segments in parts for name, facts in segments.items()},
                "scores": scores,
                "machine": machine_facts(self._fabric, self._config),
                "seconds": time.perf_counter() - started,
            }
            first_process(self._fabric, lambda: storage.publish(root, step, manifest))
        except CheckpointError as error:
            if self._is_first:
                storage.sweep(root)
            raise CheckpointError(
                f"{storage.step_folder(root, step)} could not be saved ({error}); "
                "the checkpoints before it are untouched"
            ) from error
        if self.is_best(scores):
            self._best_value = scores[self._best_name or ""]
        first_process(self._fabric, self._prune)
        self._keep_segments(state)
        first_process(self._fabric, lambda: self._write_status("running"))
        return storage.step_folder(root, step)

    def _keep_segments(self, state: Any) -> None:
        parts = _segmented(state)
        if parts:
            needed = first_process(self._fabric, lambda: storage.needed_segments(self._run.checkpoints))
            for part in parts:
                part.keep_segments(needed)

    def _require_finite(self, state: Any) -> None:
        weights = {
            f"{part}.{name}": local_part(parameter.detach()).isfinite().all()
            for part, module in states.modules(state).items()
            for name, parameter in unwrap(module).named_parameters()
        }
        finite = torch.stack(list(weights.values())).tolist() if weights else []
        broken = [name for name, good in zip(weights, finite, strict=True) if not good]
        if any(all_objects(self._fabric, bool(broken))):
            raise NonFiniteError(f"the weights of {broken[0] if broken else 'a part'} are not finite", step=state.step)

    def _write_parts(self, folder: Path, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """This process's files in the checkpoint, and those outside that it needs."""
        files = {}
        shared = states.capture(state)
        if self._is_first:
            shared[PRECISION_KEY] = states.to_plain(self._fabric.strategy.precision.state_dict(), PRECISION_KEY)
            files[SHARED_FILE] = storage.write_tensors(folder / SHARED_FILE, shared)
        for part in states.components(state).values():
            if hasattr(part, "sync"):
                part.sync()
        items = states.capture_items(state)
        if items:
            name = f"rank-{self._fabric.global_rank:05d}.pt"
            files[name] = storage.write_tensors(folder / name, items)
        segments = {name: facts for part in _segmented(state) for name, facts in part.segments().items()}
        return files, segments

    def _prune(self) -> None:
        self._write_best()
        root = self._run.checkpoints
        keep = set(storage.saved_steps(root)[-self._config.keep :])
        best = read_best(self._run.path)
        storage.prune(root, keep | ({best["step"]} if best else set()))

    def _write_best(self) -> float | None:
        """Derive ``best.json`` from the manifests that exist; return the best score."""
        candidates = []
        for step in storage.saved_steps(self._run.checkpoints):
            folder = storage.step_folder(self._run.checkpoints, step)
            try:
                value = storage.read_manifest(folder)["scores"].get(self._best_name)
            except CheckpointError as error:
                _set_aside(folder, error)
                continue
            if value is not None and value == value:
                candidates.append((value if self._mode == "min" else -value, step, value))
        path = self._run.checkpoints / "best.json"
        if not candidates:
            path.unlink(missing_ok=True)
            return None
        _, step, value = min(candidates)
        content = {"step": step, "folder": storage.step_folder(Path(), step).name, self._best_name: value}
        storage.write_atomically(path, json.dumps(content, indent=1) + "\n")
        return float(value)

    def _write_status(self, name: str, *, signal: int | None = None, error: str | None = None) -> None:
        if self._is_first:
            self._run.write_status(name, self._step, signal=signal, error=error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the signal handlers back, write the final status, and free the lock."""
        if self._guard is not None:
            self._guard.remove()
        if isinstance(error, NonFiniteError):
            self._complete(error)
        try:
            if kind is None:
                self._stopper.finish()
                self._write_final_status()
            else:
                self._write_failure(kind, error)
        finally:
            self._stopper.close()
            self._run.close()
            _end_parts(self._state, "success" if kind is None else "failed")

    def _complete(self, error: NonFiniteError) -> None:
        error.step = error.step if error.step is not None else self._step + 1
        error.run_dir = str(self._run.path)
        steps = storage.saved_steps(self._run.checkpoints)
        error.checkpoint = str(storage.step_folder(self._run.checkpoints, steps[-1])) if steps else "none"

    def _write_failure(self, kind: type[BaseException], error: BaseException | None) -> None:
        try:
            self._write_status("failed", error=f"{kind.__name__}: {error}")
        except OSError as second:  # a full disk, say, which may be what failed first
            if error is not None:
                error.add_note(f"status.json could not be written either: {second}")

    def _write_final_status(self) -> None:
        if not self.stop_requested:
            self._write_status("complete")
        else:
            signal = self._stopper.agreed
            self._write_status("stopped", signal=signal if signal > 0 else None)


def mode_of(score: str) -> Literal["min", "max"]:
    """Whether the best of a score's values is the smallest or the largest, by the words in its name.

    :class:`ConfigError` where they do not tell.

    >>> mode_of("val/accuracy"), mode_of("val/loss/size")
    ('max', 'min')
    """
    for mode, words in _WORDS.items():
        if any(word in score for word in words):
            return mode
    raise ConfigError(f"best: no word of {score!r} says whether more is better; check it, or set best_mode")


def _set_aside(folder: Path, error: CheckpointError) -> str:
    failure = f"{error}; moved aside to {storage.set_aside(folder)}"
    warnings.warn(f"checkpoint {folder.name} is not usable: {failure}", stacklevel=3)
    return failure


def _segmented(state: Any) -> list[states.SegmentState]:
    return [part for part in states.components(state).values() if isinstance(part, states.SegmentState)]


def _resume_parts(state: Any, step: int | None) -> None:
    for part in states.components(state).values():
        if hasattr(part, "resume_at"):
            part.resume_at(step)


def _end_parts(state: Any, status: str) -> None:
    for part in () if state is None else states.components(state).values():
        if hasattr(part, "end_run"):
            part.end_run(status)


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """What ``best.json`` holds, or None where no checkpoint has the score."""
    path = run_dir / "checkpoints" / "best.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_module(run_dir: str | Path, name: str, *, which: Literal["best", "last"] = "best") -> dict[str, Any]:
    """The state dict of the part ``name`` of a run's best (or last) checkpoint, verified, on the CPU.

        generator.load_state_dict(load_module("runs/gan/mine", "average"))

    ``which="best"`` falls back to the last where no checkpoint has the score that the run keeps the best of.
    """
    root = Path(run_dir) / "checkpoints"
    steps = storage.saved_steps(root)
    if not steps:
        raise ConfigError(f"run_dir: {run_dir} holds no checkpoint (yet); check the path, or wait for its first")
    best = read_best(Path(run_dir)) if which == "best" else None
    folder = storage.step_folder(root, best["step"] if best else steps[-1])
    storage.verify(folder)
    content = storage.read_tensors(folder / SHARED_FILE)
    if isinstance(content.get(name), dict):
        return content[name]  # type: ignore[no-any-return]
    prefix = f"{name}."
    part = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    if not part:
        names = sorted({key.partition(".")[0] for key in content})
        raise CheckpointError(f"{folder}: has no {name!r}; it has {', '.join(names)}")
    return part
