"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

from weft.errors import TrainingError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; a killed or failed write leaves the previous one.

    Args:
        path: where to; folders are made.
        data: the content.

    Raises:
        TrainingError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_writable(path: Path) -> None:
    """Refuse a place for files before any work is done for them.

    Args:
        path: the file to come; folders are made.

    Raises:
        TrainingError: it cannot be written.
    """
    probe = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path} cannot be written: {error}. Free space or choose another place. The model is at "
        "its last complete epoch."
    )
