"""The file that is written: whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft import files
from weft.errors import ExportError


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, before any work is done for it.

    Args:
        path: the file to come; folders are made.

    Raises:
        ExportError: says why not.
    """
    with _reported(path):
        files.check_place(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears when it is complete; a failed write leaves what was there.

    Args:
        path: where to.
        data: the content.

    Raises:
        ExportError: the file cannot be written.
    """
    with _reported(path):
        files.write_whole(path, data)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            what = "the disk (or the quota) is full. Free some space and try again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = "it is not permitted. Check the owner and the permissions, or use another folder"
        elif error.errno == errno.EISDIR:
            what = "it is a folder. Name a file in it"
        else:
            what = f"{error.strerror or error}. Use another place"
        raise ExportError(
            f"{path} cannot be written: {what}. Nothing was written; a file that was there before "
            "is unharmed."
        ) from error
