"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """A size as people write it: ``256MB``, ``1.5 GiB``, ``4096``.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"A size is a number with {', '.join(UNITS)}; found '{text}'.")
    size = float(found[1]) * UNITS[found[2].upper()]
    if not 1 <= size < 2**63:
        raise ConfigError(f"A size is at least one byte and less than 8 EiB, found '{text}'.")
    return int(size)


def readable_size(size: int) -> str:
    """A number of bytes as people read it: ``1.25 MB``."""
    for unit in ("GB", "MB", "KB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.3g} {unit}"
    return f"{size} B"
