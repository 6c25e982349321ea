"""Marks of the files that a result depends on, so that a changed file is a new cell."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from weft.data.request import split_spec


def mark(spec: str) -> str:
    """A short name for what a spec of a base or of data stands for.

    Args:
        spec: ``npz:FILE#options``, ``imagefolder:DIR``, ``python:FILE.py:FUNCTION`` and so on.

    Returns:
        A hash of a file's content or of a folder's listing (names and sizes); "" for what is no
        file here, such as a model of a hub.
    """
    prefix, _, rest = spec.partition(":")
    path, _ = split_spec(rest)
    if prefix == "python":
        path = path.rpartition(":")[0]
    return mark_of_path(Path(path).expanduser())


LOCAL = ("imagefolder", "csv", "parquet", "npz", "python")
"""Prefixes whose specs always name a file or a folder."""


def seen_from(spec: str, folder: Path) -> str:
    """A spec whose relative path is one of another working directory, as it is said here.

    Args:
        spec: as for `mark`.
        folder: where the relative path is seen from.

    Returns:
        The same spec if that is here, if its path is absolute, or if it names no file.
    """
    prefix, colon, rest = spec.partition(":")
    path, _ = split_spec(rest)
    if not colon or folder.resolve() == Path.cwd() or Path(path).expanduser().is_absolute():
        return spec
    if prefix not in LOCAL and not (folder / path).exists():
        return spec
    return f"{prefix}:{folder.resolve() / path}{rest[len(path) :]}"


def mark_of_path(path: Path) -> str:
    """A hash of a file's content or of a folder's listing; "" if there is neither."""
    if path.is_file():
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        return content.hexdigest()
    if path.is_dir():
        listing = hashlib.sha256()
        for folder, inside, names in os.walk(path):
            inside.sort()
            for name in sorted(names):
                file_path = Path(folder, name)
                size = file_path.stat().st_size if file_path.exists() else -1
                listing.update(f"{file_path.relative_to(path).as_posix()}\0{size}\n".encode())
        return listing.hexdigest()
    return ""
