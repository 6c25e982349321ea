"""Fingerprints of a base: which network were these tasks trained on?

A mark is a tensor's type, shape and a hash of its values; the fingerprint is the hash of all marks.
Taking the marks costs one pass of SHA-256 over the base (about 1 to 2 GB/s on one core, plus the
copy for tensors on a device); a bank takes them once per load, and keeps those of a model's own
base for as long as its tensors stay what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from weft.core.sites import named_tensors
from weft.errors import BankError

from .tensors import describe, hash_values

Marks = dict[str, str]
"""By tensor name, ``"float32 [16, 3, 3, 3] <hash>"``; a hash that nobody knows yet is ``?``."""

UNKNOWN = "?"

Stamp = tuple[int, int] | None
"""Memory and version of a tensor; None if it keeps no count of versions."""


class MarkCache:
    """Marks of modules, taken again only for tensors that may have changed.

    A tensor is taken for unchanged while it is the same memory at the same version; writing through
    ``.data`` escapes this, so a base that comes from outside is always taken anew.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[list[Stamp], Marks]] = WeakKeyDictionary()

    def marks(self, module: nn.Module, *, anew: bool = False) -> Marks:
        """The marks of a module's parameters and buffers; the same object if nothing changed.

        Args:
            module: a base.
            anew: whether to hash every tensor.

        Raises:
            BankError: a tensor without values.
        """
        tensors = dict(named_tensors(module))
        stamps = [_stamp(t) for t in tensors.values()]
        before, known = self._known.get(module, ([], {}))
        if before == stamps and None not in stamps and list(known) == list(tensors) and not anew:
            return known
        old = {} if anew else dict(zip(known, before, strict=True))
        marks = {
            name: known[name] if stamp and old.get(name) == stamp else mark(name, tensor)
            for (name, tensor), stamp in zip(tensors.items(), stamps, strict=True)
        }
        self._known[module] = (stamps, marks)
        return marks

    def adopt(self, module: nn.Module, marks: Marks) -> None:
        """Take the marks of a module from one that shares its memory."""
        tensors = dict(named_tensors(module))
        ordered = {name: marks[name] for name in tensors}
        self._known[module] = ([_stamp(t) for t in tensors.values()], ordered)


def _stamp(tensor: Tensor) -> Stamp:
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def mark(name: str, tensor: Tensor) -> str:
    """Type, shape and hash of one tensor."""
    if tensor.is_meta:
        raise BankError(f"'{name}' of the base has no values (it is on 'meta'). Load them first.")
    return f"{describe(tensor)} {hash_values(tensor)}"


def without_values(marks: Mapping[str, str], names: Collection[str]) -> Marks:
    """Marks in which the values of some tensors count as unknown."""
    return {n: f"{_words(m)} {UNKNOWN}" if n in names else m for n, m in marks.items()}


def fingerprint(marks: Mapping[str, str]) -> str:
    """One hash for all marks."""
    lines = "\n".join(f"{name} {marks[name]}" for name in sorted(marks))
    return hashlib.sha256(lines.encode()).hexdigest()


def merge(known: Mapping[str, str], new: Mapping[str, str]) -> Marks:
    """Marks with the values of both."""
    return {n: new[n] if _value(m) == UNKNOWN else m for n, m in known.items()}


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How two bases differ, in words; empty if they agree in all that is known.

    Args:
        expected: the marks of the bank's base.
        found: the marks of the base at hand.
    """
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected]
    both = [n for n in expected if n in found]
    other = [
        f"{n} is {_words(found[n])}, expected {_words(expected[n])}"
        for n in both
        if _words(found[n]) != _words(expected[n])
    ]
    values = [
        n
        for n in both
        if _words(found[n]) == _words(expected[n])
        and UNKNOWN not in (_value(found[n]), _value(expected[n]))
        and _value(found[n]) != _value(expected[n])
    ]
    parts = [
        _few(missing, "tensor is missing", "tensors are missing"),
        _few(extra, "tensor is new", "tensors are new"),
        _few(other, "tensor has another shape or type", "tensors have other shapes or types"),
        _few(values, "tensor has other values", "tensors have other values"),
    ]
    return "; ".join(part for part in parts if part)


def _few(names: list[str], one: str, several: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {one if len(names) == 1 else several} ({shown})"


def _words(mark: str) -> str:
    return mark.rpartition(" ")[0]


def _value(mark: str) -> str:
    return mark.rpartition(" ")[2]


def base_entry(base: nn.Module, marks: Mapping[str, str]) -> dict[str, Any]:
    """What ``bank.json`` says about the base."""
    return {
        "class": class_name(base),
        "fingerprint": fingerprint(marks),
        "parameters": sum(p.numel() for p in base.parameters()),
        "bytes": sum(t.numel() * t.element_size() for _, t in named_tensors(base)),
        "tensors": dict(marks),
    }


def class_name(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
