"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

from pathlib import Path

from weft import files
from weft.errors import TrainingError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; a killed or failed write leaves the previous one.

    Args:
        path: where to; folders are made.
        data: the content.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        files.write_whole(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_writable(path: Path) -> None:
    """Refuse a place for files before any work is done for them.

    Args:
        path: the file to come; folders are made.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        files.check_place(path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path} cannot be written: {error}. Free space or choose another place. The model is at "
        "its last complete epoch."
    )
