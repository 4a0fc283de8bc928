"""Append-only records in files of a fixed number each: state that is too large to be written anew at every save."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_custom.environments.arrays import Array
from lightning_custom.errors import CheckpointError
from lightning_custom.storage import fsync_file, hash_of_beginning

Facts = dict[str, dict[str, Any]]
"""By a segment's path below the run's directory: how many of its first bytes are used, and their checksum."""


class Segments:
    """Records of ``dtype``, numbered from 0 on, in files ``RUN_DIR/FOLDER/NAME-00000000.bin`` of ``size`` each.

    A record is written once and never changed. Files are read through memory maps and written by plain writes: a full
    disk then raises ``OSError``, where a write to a map would kill the process. A file has its full length from the
    start, without taking the space (where the file system has sparse files).

    Nothing is created before the first record is flushed.
    """

    def __init__(self, run_dir: Path, folder: str, name: str, dtype: np.dtype[Any], size: int) -> None:
        self.count = 0
        """Records so far."""
        self.start = 0
        """The oldest one that can be read."""
        self._run_dir, self._folder, self._name = run_dir, folder, name
        self._dtype, self._size = dtype, size
        self._pending = bytearray()  # never of more than one segment
        self._file: int | None = None
        self._hash = hashlib.sha256()  # of the open segment
        self._checksums: dict[int, str] = {}  # of the full ones
        self._maps: dict[int, Array] = {}
        self._kept: frozenset[str] = frozenset()
        self._unsynced: set[int] = set()
        self._has_new_files = False

    def append(self, record: bytes) -> None:
        """Add one record, given as its bytes; it reaches the file at the next :meth:`take` or :meth:`sync`."""
        self._pending += record
        self.count += 1
        if self.count % self._size == 0:
            self._finish_segment()

    def _finish_segment(self) -> None:
        self._flush()
        number = self.count // self._size - 1
        self._checksums[number], self._hash = self._hash.hexdigest(), hashlib.sha256()
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        number = (self.count - 1) // self._size
        if self._file is None:
            self._file = self._open(number)
        used = self._used(number)
        os.lseek(self._file, used - len(self._pending), os.SEEK_SET)
        with memoryview(self._pending) as data:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._hash.update(data)
        self._pending.clear()
        self._unsynced.add(number)

    def _open(self, number: int) -> int:
        path = self._path(number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._has_new_files = True
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        os.ftruncate(file, self._size * self._dtype.itemsize)
        return file

    def _path(self, number: int) -> Path:
        return self._run_dir / self._relative(number)

    def _relative(self, number: int) -> str:
        return f"{self._folder}/{self._name}-{number:08d}.bin"

    def _used(self, number: int) -> int:
        """Bytes of the records in a segment."""
        return min(self._size, self.count - number * self._size) * self._dtype.itemsize

    def take(self, indices: Array) -> Array:
        """The records ``[N]`` of those numbers, copied."""
        self._flush()
        numbers, places = np.divmod(indices, self._size)
        if len(numbers) and (numbers == numbers[0]).all():
            alone: Array = self._map(int(numbers[0]))[places]
            return alone
        found = np.empty(len(indices), self._dtype)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            found[here] = self._map(number)[places[here]]
        return found

    def read(self, indices: Array) -> Array:
        """The same, for records that will not soon be read again: nothing stays open."""
        found = self.take(indices)
        self._maps.clear()
        return found

    def _map(self, number: int) -> Array:
        if number not in self._maps:
            mapped = np.memmap(self._path(number), self._dtype, "r", shape=(self._size,))
            self._maps[number] = np.asarray(mapped)  # whose indexing is faster
        return self._maps[number]

    def drop_before(self, start: int) -> None:
        """Let go of the records before ``start``, and of the files that hold nothing else unless a checkpoint does."""
        before, self.start = self.start, start
        for number in range(before // self._size, start // self._size):
            self._maps.pop(number, None)
            self._checksums.pop(number, None)
            if self._relative(number) not in self._kept:
                self._path(number).unlink(missing_ok=True)

    def sync(self) -> set[Path]:
        """Bring every record to the disk; return the folders that have new entries, for the caller to do the same."""
        self._flush()
        for number in self._unsynced:
            if number >= self.start // self._size:
                fsync_file(self._path(number))
        self._unsynced.clear()
        if not self._has_new_files:
            return set()
        self._has_new_files = False
        folder = self._path(0).parent
        return {folder, *(parent for parent in folder.parents if parent.is_relative_to(self._run_dir))}

    def facts(self) -> Facts:
        """The files that hold the records from :attr:`start` on."""
        self._flush()
        numbers = range(self.start // self._size, -(-self.count // self._size))
        return {
            self._relative(number): {
                "size": self._used(number),
                "sha256": self._checksums.get(number) or self._hash.hexdigest(),
            }
            for number in numbers
        }

    def restore(self, start: int, count: int, facts: Mapping[str, dict[str, Any]]) -> None:
        """Go back to what there was when ``facts`` were taken; what was appended since is ignored until :meth:`cut`.

        :class:`CheckpointError` names a file that is not as it was, of which the open one alone is looked at here:
        a checkpointer has verified them all.
        """
        self.close()
        self._pending.clear()
        self._maps.clear()
        self.start, self.count, self._hash = start, count, hashlib.sha256()
        numbers = range(start // self._size, count // self._size)
        self._checksums = {number: facts[self._relative(number)]["sha256"] for number in numbers}
        last = count // self._size
        if count % self._size:
            self._hash = hash_of_beginning(self._path(last), self._used(last))
            if self._hash.hexdigest() != facts[self._relative(last)]["sha256"]:
                raise CheckpointError(f"{self._path(last)}: checksum differs from the checkpoint's")

    def cut(self) -> None:
        """Remove from the files what is past the last record."""
        last = self.count // self._size
        for number in self._numbers_on_disk():
            if number > last or (number == last and self.count % self._size == 0):
                self._path(number).unlink()
            elif number == last:
                os.truncate(self._path(number), self._used(number))
                os.truncate(self._path(number), self._size * self._dtype.itemsize)

    def keep(self, names: Iterable[str]) -> None:
        """Delete the files before :attr:`start` but for those that checkpoints need, whose ``names`` these are."""
        self._kept = frozenset(names)
        for number in self._numbers_on_disk():
            if number < self.start // self._size and self._relative(number) not in self._kept:
                self._path(number).unlink(missing_ok=True)

    def _numbers_on_disk(self) -> list[int]:
        found = (re.fullmatch(rf"{self._name}-(\d{{8,}})\.bin", path.name) for path in self._path(0).parent.glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def close(self) -> None:
        """Close the open file; the next record opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()
