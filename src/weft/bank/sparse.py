"""Tensors with many zeros as they lie in files: the other values, and where they are.

A tensor of n elements of which v are not zero takes v values and n bits, or v values and v places
of 32 bits, whichever is less; a tensor of bools takes n bits. Zero is what has no bit set, so that
every value comes back bit for bit, -0.0 too. Equal sets of bits are stored once: a weight and its
mask have theirs in common.
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

_BITS, _PLACES = "bits", "places"
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
    known: dict[bytes, str] = {}
    for key, tensor in tensors.items():
        packed = _packed(tensor)
        if packed is None:
            stored[key] = tensor
            continue
        form: dict[str, Any] = {"shape": list(tensor.shape)}
        for part, values in packed.items():
            name = f"{key}|{part}"
            if part == _BITS:
                name = known.setdefault(values.numpy().tobytes(), name)
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
    bits = -(-len(there) // 8)
    if tensor.dtype == torch.bool:
        return {_BITS: _bits_of(there)} if _pays(size, bits) else None
    count = int(np.count_nonzero(there))
    places = 4 * count if len(there) < 1 << 31 else size
    if not _pays(size, count * tensor.element_size() + min(bits, places)):
        return None
    mask = torch.from_numpy(there)
    if places < bits:
        where = torch.from_numpy(np.flatnonzero(there).astype(np.int32))
        return {"values": flat[mask], _PLACES: where}
    return {"values": flat[mask], _BITS: _bits_of(there)}


def _pays(size: int, smaller: int) -> bool:
    return size - smaller >= max(WORTH_IT, size // SHARE)


def _bits_of(there: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.packbits(there, bitorder="little"))


def _unpacked(key: str, form: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    shape = [int(size) for size in form["shape"]]
    length = math.prod(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"'{key}' has the shape {shape}")
    if _PLACES in form:
        where = stored[form[_PLACES]].numpy()
        if where.size and not 0 <= where.min() <= where.max() < length:
            raise ValueError(f"'{key}' has values outside of its {length} places")
    else:
        bits = stored[form[_BITS]]
        if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != -(-length // 8):
            raise ValueError(f"'{key}' has {bits.numel()} bytes of bits for {length} elements")
        there = np.unpackbits(bits.numpy(), count=length, bitorder="little").view(np.bool_)
        if "values" not in form:
            return torch.from_numpy(there).view(shape)
        where = np.flatnonzero(there)
    values = stored[form["values"]]
    if values.shape != where.shape:
        raise ValueError(f"'{key}' has {values.numel()} values for {where.size} places")
    pattern = _PATTERN[values.element_size()]
    whole = torch.zeros(length, dtype=pattern)
    whole.numpy()[where] = values.view(pattern).numpy()
    return whole.view(values.dtype).view(shape)
