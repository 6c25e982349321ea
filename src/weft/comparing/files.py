"""Small files that several processes may write at the same time."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from weft import files
from weft.errors import DataError, TrainingError


def put(path: Path, data: bytes) -> None:
    """Write a file; readers and a killed write see the old one or the new one, whole.

    Args:
        path: where to; folders are made.
        data: the content.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        files.write_whole(path, data)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error}. Free space or choose another place."
        ) from error


def put_json(path: Path, content: Any) -> None:
    """Write plain values as JSON; as `put`."""
    put(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def get_json(path: Path) -> Any | None:
    """The content of a JSON file, or None if there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove it to make it anew.") from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no space left."""
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    while error is not None:
        if isinstance(error, OSError) and error.errno in full:
            return True
        error = error.__cause__ or error.__context__
    return False
