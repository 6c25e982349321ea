"""A lock that ends with the process that holds it, so that it is never stale."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock for a ``with`` block.

    The file itself means nothing: the operating system's lock on it ends with its process, however
    that ends. Without such locks (Windows) one writer at a time is up to the caller.

    Args:
        path: the lock's file; its folder is made.
        wait: whether to wait until it is free.

    Returns:
        Whether the lock is held; if not, another living process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield _taken(handle, wait=wait)
    finally:
        os.close(handle)


def _taken(handle: int, *, wait: bool) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
