"""The files of a bank: staging, folders that are whole, locks, and reading without surprises.

Everything is written into a staging folder of its own and then renamed into place. Writers hold an
exclusive lock for the renames, readers a shared one while they read a bundle. Locks belong to the
operating system (flock): they end with the process that holds them, so a lock is never stale, and
a lock file that lies around means nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from weft.errors import BankError
from weft.files import make_folder, sync_folder

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
STAGING = ".staging"
PATIENCE = 60.0
"""Seconds to wait for another process before giving up."""

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


@contextmanager
def reported(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ones that say what to do.

    Args:
        action: what was being done, for instance "save 'flowers'".
        path: where.

    Raises:
        BankError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        at = error.filename or path
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            what = "the disk (or the quota) is full. Free some space and try again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = "it is not permitted. Check the owner and the permissions, or use another folder"
        elif error.errno in (errno.ELOOP, errno.EMLINK):
            what = "it is a symbolic link, which a bank does not follow. Put the file itself there"
        elif error.errno == errno.ENAMETOOLONG:
            what = "the name is too long for this file system. Use a shorter one"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            what = "something that is not a folder of a bank is in the way. Use another folder"
        else:
            what = f"{error.strerror or error}"
        raise BankError(
            f"Cannot {action}: at {at}, {what}. What the bank held before is unharmed."
        ) from error


@contextmanager
def opened(path: Path, expected_bytes: int | None = None) -> Iterator[FileIO]:
    """A regular file to read from, for a ``with`` block.

    Args:
        path: the file; a symbolic link is refused.
        expected_bytes: its size, where that is known.

    Raises:
        BankError: the file is missing or has another size.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _NO_FOLLOW | _CLOEXEC | _BINARY)
    except FileNotFoundError:
        raise BankError(
            f"{path} is missing. Restore it from a copy, or save the task again."
        ) from None
    with FileIO(handle, "rb") as file:
        size = os.fstat(handle).st_size
        if expected_bytes is not None and size != expected_bytes:
            short = "was cut short" if size < expected_bytes else "is not the file that was saved"
            raise BankError(
                f"{path} {short}: found {size} bytes, expected {expected_bytes}. "
                "Restore it from a copy, or save the task again."
            )
        yield file


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        BankError: the file is missing.
    """
    with opened(path) as file:
        return file.read()


@contextmanager
def locked(root: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the bank's lock for a ``with`` block; other holders are waited for.

    Args:
        root: the bank's folder.
        exclusive: for changes; reading shares the lock.

    Raises:
        BankError: another process held the lock for longer than a minute.
    """
    if sys.platform == "win32":
        yield  # without flock, one writer at a time is up to the caller
        return
    try:
        flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        handle = os.open(root / LOCK, flags | _NO_FOLLOW | _CLOEXEC, 0o666)
    except FileNotFoundError:
        if exclusive:
            raise
        yield  # a bank that was copied without its lock file, or none at all: nobody is writing
        return
    try:
        _wait_for(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, root)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, kind: int, root: Path) -> None:
    if sys.platform == "win32":
        return
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BankError(
                    f"Another process has held the lock of {root} for {PATIENCE:.0f} seconds. "
                    f"Find it with 'fuser {root / LOCK}' and let it finish or end it; the lock "
                    "ends with it. Deleting the file does not help."
                ) from None
            time.sleep(0.005)
        else:
            return


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A folder to prepare files in, beside the place where they will be renamed to.

    What killed processes left behind is removed first: a living one holds a lock on its folder.
    """
    with locked(root, exclusive=True):
        area = root / STAGING
        make_folder(area)
        _clear_abandoned(area)
        place = area / uuid.uuid4().hex
        make_folder(place)
        holder = _hold(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if holder is not None:
            os.close(holder)


def _hold(place: Path) -> int | None:
    """A handle that holds the lock of a folder; None if somebody else holds it."""
    if sys.platform == "win32":
        return None
    handle = os.open(place, os.O_RDONLY | _NO_FOLLOW | _CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _clear_abandoned(area: Path) -> None:
    if sys.platform == "win32":
        return
    for place in area.iterdir():
        holder = None if place.is_symlink() or not place.is_dir() else _hold(place)
        if holder is not None:
            shutil.rmtree(place, ignore_errors=True)
            os.close(holder)


def previous(place: Path) -> Path:
    """Where a folder waits while its successor is renamed into place."""
    return place.with_name(f".{place.name}.old")


def current(place: Path) -> Path:
    """A folder, or its predecessor if a process was killed between two renames."""
    return previous(place) if not place.exists() and previous(place).exists() else place


def put_folder(new: Path, place: Path) -> None:
    """Rename a prepared folder into place, over an older one if there is one.

    Killed at any point, `current` finds either the old folder or the new one, whole.
    """
    old = previous(place)
    if place.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        if old.exists():
            os.rename(old, place)
        raise
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_folder(place: Path, area: Path) -> None:
    """Remove a folder: at once by name, then piece by piece.

    Args:
        place: the folder.
        area: a staging folder to move it to first.
    """
    if place.exists() and previous(place).exists():
        shutil.rmtree(previous(place))  # or it would come back as the current one
    os.rename(current(place), area / "dropped")
    sync_folder(place.parent)
