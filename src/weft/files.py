"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from pathlib import Path

_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears when it is complete; a failed or killed write leaves the old one.

    Args:
        path: where to; folders are made.
        data: the content.

    Raises:
        OSError: it cannot be written.
    """
    part = beside(path)
    make_folder(path.parent)
    try:
        write_file(part, data)
        put_file(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Find out that a file cannot be written, before any work is done for it.

    Args:
        path: the file to come; folders are made.

    Raises:
        OSError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "It is a folder", str(path))
    make_folder(path.parent)
    probe = beside(path)
    write_file(probe, b"")
    probe.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC | _BINARY
    handle = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def put_file(new: Path, place: Path) -> None:
    """Rename a prepared file into place, over an older one if there is one."""
    os.replace(new, place)
    sync_folder(place.parent)


def beside(path: Path) -> Path:
    """A new name beside a file, so that one can be renamed to the other."""
    return path.with_name(f".{uuid.uuid4().hex}.part")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    if not path.is_dir():
        os.makedirs(path, exist_ok=True)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY | _CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
