"""Checkpoint folders that appear whole or not at all, and are read only when every byte is as written."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from lightning_custom.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = ".tmp-"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies under ``root``."""
    return root / f"step-{step:08d}"


def temporary_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before its rename."""
    return root / f"{_TEMPORARY}step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """The steps of the checkpoints under ``root``, oldest first."""
    folders = root.glob("step-*") if root.is_dir() else ()
    return sorted(int(folder.name[5:]) for folder in folders if folder.name[5:].isdigit())


def write_tensors(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``content`` to ``path`` and on to the disk; return its size and checksum."""
    with path.open("wb") as file:
        hashed = _HashedWriter(file)
        torch.save(content, hashed)  # type: ignore[arg-type]  # write and flush are all that it calls
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


class _HashedWriter:
    """A file that is hashed while it is written, so that the checksum is of what was meant."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest, self.size, self._file = hashlib.sha256(), 0, file

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self.digest.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def publish(root: Path, step: int, manifest: dict[str, Any]) -> None:
    """Write the manifest, last, into the temporary folder of ``step``; rename the folder; read it all back."""
    temporary, final = temporary_folder(root, step), step_folder(root, step)
    write_atomically(temporary / MANIFEST, json.dumps({"format": FORMAT, "step": step, **manifest}, indent=1))
    fsync_folder(temporary)
    if final.exists():
        discard(final)
    temporary.rename(final)
    fsync_folder(root)
    verify(final)


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
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files have the size and checksum that it names."""
    manifest = read_manifest(folder)
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
    """Delete what an interrupted save left behind; only for the process that holds the run's lock."""
    for path in list(_temporary_paths(root)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                path.unlink()


def _temporary_paths(root: Path) -> Iterator[Path]:
    return root.glob(f"{_TEMPORARY}*") if root.is_dir() else iter(())


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``, on the disk before it takes the name."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
