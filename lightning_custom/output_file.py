"""The file that a verb writes, such as ``sample``, ``attack`` and ``enjoy`` with ``--out``."""

from pathlib import Path

from lightning_custom.errors import ConfigError


def require_ending(path: Path, endings: tuple[str, ...]) -> None:
    """:class:`ConfigError` for a file whose name says that it is of another kind; ask before the work."""
    if path.suffix not in endings:
        raise ConfigError(f"out: {path} does not end in {' or '.join(endings)}; choose another with --out")


def write_file(path: Path, content: bytes) -> None:
    """Write ``content``; :class:`ConfigError` where that cannot be."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"out: cannot write {path} ({error.strerror}); choose another with --out") from error
