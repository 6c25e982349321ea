"""JSON documents that a person can read and that notice any change.

The last entry of a document is a checksum: the SHA-256 of the file's bytes with 64 zeros in the
checksum's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import BankError

from .files import read_file

VERSION = 1
"""The version of the format that this release writes; it reads this one and older ones."""

_KEY = b'"checksum": "'
_ZEROS = b"0" * 64
_WIDTH = 100


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it: tuples become lists, numpy's numbers Python's, all else stays.

    Args:
        value: numbers, strings, lists, dictionaries with string keys.
        where: its name, for errors.

    Raises:
        BankError: the value has no plain form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BankError(
                    f"{where} has the key {key!r}; keys of what a bank stores are strings. "
                    f"Use {str(key)!r}."
                )
        return {key: plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    raise BankError(
        f"{where} is a {type(value).__name__}, which cannot be written down. A bank stores plain "
        "values: numbers, strings, lists and dictionaries. Convert it first, for instance with "
        "float() or .tolist()."
    )


def tuples(value: Any) -> Any:
    """A value read from JSON with tuples for lists, as frozen data has them."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def render(kind: str, content: Mapping[str, Any]) -> bytes:
    """The bytes of a document.

    Args:
        kind: what it describes ("bundle").
        content: its entries, plain values.
    """
    whole = {"format": f"weft {kind}", "version": VERSION, **content, "checksum": _ZEROS.decode()}
    data = (_pretty(whole, "") + "\n").encode()
    at = data.rindex(_KEY) + len(_KEY)
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:at] + digest + data[at + 64 :]


def read_document(path: Path, kind: str) -> dict[str, Any]:
    """The entries of a document.

    Args:
        path: its file.
        kind: what it must describe.

    Raises:
        BankError: it is missing, damaged, of another kind, or of a newer format.
    """
    return parse(path, kind, read_file(path))


def parse(path: Path, kind: str, data: bytes) -> dict[str, Any]:
    """As `read_document`, from bytes that were read already."""
    at = data.rfind(_KEY) + len(_KEY)
    zeroed = data[:at] + _ZEROS + data[at + 64 :]
    intact = at >= len(_KEY) and hashlib.sha256(zeroed).hexdigest().encode() == data[at : at + 64]
    content: Any = None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        intact = False
    if not intact or not isinstance(content, dict):
        again = "save the task again"
        if kind == "bank":
            again = "delete it and save one of the tasks again (the bundles stay)"
        raise BankError(
            f"{path} does not match its checksum: it was cut short, damaged, edited by hand, or it "
            f"is no file of a bank. Restore it from a copy, or {again}."
        )
    found, version = content.get("format"), content.get("version")
    if found != f"weft {kind}":
        raise BankError(f"{path} is a {found!r}, expected a 'weft {kind}'.")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise BankError(
            f"{path} has format version {version}; this weft reads up to {VERSION}. "
            "Upgrade it: pip install --upgrade weft-share"
        )
    return content


def _pretty(value: Any, indent: str) -> str:
    """JSON in which everything that fits on a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    nested = isinstance(value, (dict, list)) and bool(value)
    if not nested or (indent and len(line) + len(indent) <= _WIDTH):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items()
        ]
    else:
        parts = [_pretty(v, inner) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"
