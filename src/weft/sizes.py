"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str, *, least: int = 1) -> int:
    """A size as people write it: ``256MB``, ``1.5 GiB``, ``4096``.

    Args:
        text: the size.
        least: bytes that it must have, 0 or 1.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"A size is a number with {', '.join(UNITS)}; found '{text}'.")
    size = float(found[1]) * UNITS[found[2].upper()]
    if not least <= size < 2**63:
        expected = "at least one byte and less" if least else "less"
        raise ConfigError(f"A size is {expected} than 8 EiB, found '{text}'.")
    return int(size)


def readable_size(size: int) -> str:
    """A number of bytes as people read it: ``1.25 MB``."""
    for unit in ("GB", "MB", "kB"):
        if abs(size) >= UNITS[unit.upper()]:
            return f"{size / UNITS[unit.upper()]:.3g} {unit}"
    return f"{size} B"


def share_or_bytes(text: str) -> float | int:
    """A share as people write it, ``10%`` or ``0.1``, or a size, ``300kB``.

    Returns:
        A share in (0, 1], or a whole number of bytes.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if found is None:
        return size_in_bytes(text)
    number = float(found[1]) / (100 if found[2] else 1)
    if 0 < number <= 1:
        return number
    if found[2] or number != int(number):
        raise ConfigError(f"A share is more than 0 and at most 100 %, found '{text}'.")
    return int(number)
