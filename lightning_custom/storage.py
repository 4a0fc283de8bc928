"""Checkpoint folders that appear whole or not at all, and are read only when every byte is as written."""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from lightning_custom.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = ".tmp-"
_REPLACED = f"{_TEMPORARY}replaced-"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies under ``root``."""
    return root / f"step-{step:08d}"


def temporary_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before its rename."""
    return root / f"{_TEMPORARY}step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """The steps of the checkpoints under ``root``, oldest first."""
    names = [path.name for path in root.glob("step-*")] if root.is_dir() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", name))


def write_tensors(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``content`` to ``path`` and on to the disk; return its size and checksum."""
    with path.open("wb") as file:
        hashed = _HashedWriter(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]  # write and flush are all that it calls
        except RuntimeError as error:
            # torch wraps a full disk in a line about its own source.
            raise hashed.failure or error from None
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


class _HashedWriter:
    """A file that is hashed while it is written, so that the checksum is of what was meant."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest, self.size, self._file = hashlib.sha256(), 0, file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self.digest.update(data)
        self.size += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def publish(root: Path, step: int, manifest: dict[str, Any]) -> None:
    """Write the manifest, last, into the temporary folder of ``step``; rename the folder; read it all back."""
    temporary, final = temporary_folder(root, step), step_folder(root, step)
    content = {"format": FORMAT, "step": step, **manifest}
    text = json.dumps({"sha256": _manifest_checksum(content), **content}, indent=1)
    write_atomically(temporary / MANIFEST, text)
    fsync_folder(temporary)
    replaced = root / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)  # sweep puts it back if the next line is never reached
    temporary.rename(final)
    fsync_folder(root)
    try:
        verify(final)
    except CheckpointError:
        set_aside(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _manifest_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; :class:`CheckpointError` where there is none that can be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT}")
    if manifest.pop("sha256", None) != _manifest_checksum(manifest):
        raise CheckpointError(f"{path}: checksum differs from its content")
    return manifest


def verify(folder: Path, *, run_dir: Path | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files have the size and checksum that it names.

    With ``run_dir``, also the files outside the checkpoint that it needs the beginning of.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.get("segments", {}).items() if run_dir is not None else ():
        if hash_of_beginning(run_dir / name, expected["size"]).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{run_dir / name}: checksum differs from the manifest's")
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path}: {size} bytes instead of {expected['size']}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: unreadable ({error.strerror})") from error
        if digest != expected["sha256"]:
            raise CheckpointError(f"{path}: checksum differs from the manifest's")
    return manifest


def hash_of_beginning(path: Path, size: int) -> Any:
    """The running SHA-256 of a file's first ``size`` bytes; :class:`CheckpointError` where it has fewer."""
    digest, rest = hashlib.sha256(), size
    try:
        with path.open("rb") as file:
            while rest and (block := file.read(min(rest, 1 << 20))):
                digest.update(block)
                rest -= len(block)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror})") from error
    if rest:
        raise CheckpointError(f"{path}: {size - rest} bytes instead of {size}")
    return digest


def needed_segments(root: Path) -> set[str]:
    """The files outside the checkpoints under ``root`` that any of them needs."""
    folders = [step_folder(root, step) for step in saved_steps(root)]
    return {name for folder in folders for name in read_manifest(folder).get("segments", {})}


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a verified file, by the loader that runs no code; :class:`CheckpointError` if it would."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: refused by the safe loader ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} instead of a dict")
    return content


def prune(root: Path, keep: set[int]) -> None:
    """Delete the checkpoints whose step is not in ``keep``."""
    for step in saved_steps(root):
        if step not in keep:
            discard(step_folder(root, step))


def discard(folder: Path) -> None:
    """Delete a checkpoint so that at no moment half of one bears a checkpoint's name."""
    doomed = folder.with_name(f"{_TEMPORARY}doomed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that cannot be used to ``step-N.bad`` and return its new path."""
    aside = folder.with_name(f"{folder.name}.bad")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.bad-{number}")
    folder.rename(aside)
    return aside


def sweep(root: Path) -> None:
    """Undo what an interrupted save left behind; only for the process that holds the run's lock."""
    for replaced in root.glob(f"{_REPLACED}*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    for path in root.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``, on the disk before it takes the name."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fsync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders, and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
