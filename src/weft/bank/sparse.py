"""Tensors with many zeros as they lie in files: the other values, and where they are.

Where the v values of a tensor of n elements are takes n bits, or v bytes and some more, whichever
is less: a byte b < 255 says that b zeros stand before the next value, 255 that 255 zeros stand here
and no value. A tensor of bools has no values beside. Zero is what has no bit set, so that every
value comes back bit for bit, -0.0 too. What is said equally of two tensors is stored once: a weight
and its mask have it in common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORTH_IT = 1 << 9
"""Bytes that leaving out zeros must save: more than saying how takes."""

SHARE = 8
"""And the part of its size that a tensor must save, for putting zeros back takes time."""

_BITS, _GAPS, _VALUES = "bits", "gaps", "values"
_LONG = 255
"""The gap that goes on."""

_PATTERN = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """What a file holds in place of some tensors.

    Args:
        tensors: by key, on the CPU, row by row in memory.

    Returns:
        By key, the tensors that are stored; and the file's metadata, which says how those that are
        not stored as they are come back, or None if all are.
    """
    stored: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    known: dict[tuple[str, bytes], str] = {}
    for key, tensor in tensors.items():
        packed = _packed(tensor)
        if packed is None:
            stored[key] = tensor
            continue
        form: dict[str, Any] = {"shape": list(tensor.shape)}
        for part, values in packed.items():
            name = f"{key}|{part}"
            while name in tensors:
                name += "|"
            if part != _VALUES:
                name = known.setdefault((part, values.numpy().tobytes()), name)
            stored.setdefault(name, values)
            form[part] = name
        forms[key] = form
    return stored, {"weft": json.dumps(forms)} if forms else None


def unpack(stored: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `pack`.

    Raises:
        ValueError: the parts do not fit together.
    """
    forms = json.loads(metadata.get("weft", "{}"))
    parts = {name for form in forms.values() for part, name in form.items() if part != "shape"}
    whole = {key: tensor for key, tensor in stored.items() if key not in parts}
    return whole | {key: _unpacked(key, form, stored) for key, form in forms.items()}


def _packed(tensor: Tensor) -> dict[str, Tensor] | None:
    """The parts that a tensor is stored as; None if it is stored as it is."""
    size = tensor.numel() * tensor.element_size()
    if size < WORTH_IT or tensor.element_size() not in _PATTERN:
        return None
    flat = tensor.reshape(-1)
    # numpy counts and packs bits several times as fast as torch does.
    there = flat.view(_PATTERN[tensor.element_size()]).numpy() != 0
    count = int(np.count_nonzero(there))
    is_mask = tensor.dtype == torch.bool
    values = 0 if is_mask else count * tensor.element_size()
    bits = -(-len(there) // 8)
    if not _pays(size, values + min(bits, count)):
        return None
    part, where = _GAPS, _gaps_of(there) if count < bits else None
    if where is None or len(where) >= bits:
        part, where = _BITS, np.packbits(there, bitorder="little")
    if not _pays(size, values + len(where)):
        return None
    stored = {part: torch.from_numpy(where)}
    return stored if is_mask else stored | {_VALUES: flat[torch.from_numpy(there)]}


def _pays(size: int, smaller: int) -> bool:
    return size - smaller >= max(WORTH_IT, size // SHARE)


def _gaps_of(there: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The zeros before each value and behind the last one, as bytes."""
    where = np.flatnonzero(there)
    zeros_before = np.diff(where, prepend=-1) - 1
    long, rest = np.divmod(zeros_before, _LONG)
    at = np.cumsum(long + 1) - 1
    behind = (len(there) - 1 - int(where[-1] if where.size else -1)) // _LONG
    gaps = np.full((int(at[-1]) + 1 if where.size else 0) + behind, _LONG, np.uint8)
    gaps[at] = rest
    return gaps


def _unpacked(key: str, form: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    shape = [int(size) for size in form["shape"]]
    length = math.prod(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"'{key}' has the shape {shape}")
    part = _GAPS if _GAPS in form else _BITS
    said = stored[form[part]]
    if said.dtype != torch.uint8 or said.dim() != 1:
        raise ValueError(f"'{key}' has {part} of {said.dtype} {list(said.shape)}")
    if part == _BITS and _VALUES not in form:
        return torch.from_numpy(_from_bits(key, said.numpy(), length)).view(shape)
    if part == _BITS:
        where = np.flatnonzero(_from_bits(key, said.numpy(), length))
    else:
        where = _from_gaps(key, said.numpy(), length)
    true = torch.ones(len(where), dtype=torch.bool)
    values = stored[form[_VALUES]] if _VALUES in form else true
    if values.shape != where.shape:
        raise ValueError(f"'{key}' has {values.numel()} values for {where.size} places")
    pattern = _PATTERN[values.element_size()]
    whole = torch.zeros(length, dtype=pattern)
    whole.numpy()[where] = values.view(pattern).numpy()
    return whole.view(values.dtype).view(shape)


def _from_bits(key: str, bits: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Whether there is a value, place by place."""
    if len(bits) != -(-length // 8):
        raise ValueError(f"'{key}' has {len(bits)} bytes of bits for {length} elements")
    return np.unpackbits(bits, count=length, bitorder="little").view(np.bool_)


def _from_gaps(key: str, gaps: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """The places of the values; the inverse of `_gaps_of`."""
    is_value = gaps != _LONG
    ends = np.cumsum(gaps + is_value, dtype=np.int64)
    end = int(ends[-1]) if ends.size else 0
    if not end <= length < end + _LONG:
        raise ValueError(f"'{key}' has gaps for {end} elements of {length}")
    return (ends if is_value.all() else ends[is_value]) - 1
