"""Tensors to bytes and back, exactly: values, dtypes, memory layout, and what each of them is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from weft.errors import BankError

from .files import opened
from .sparse import pack, unpack

CHUNK = 1 << 19
"""Bytes to read before they are hashed, while a core's cache still has them."""

_NO_TENSORS = (
    *(ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, RecursionError, RuntimeError),
)
"""What reading a file raises that was made otherwise."""

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


def describe(tensor: Tensor) -> str:
    """Type and shape in words, for instance ``float32 [16, 3, 3, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def table(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a document says about a file of tensors.

    Args:
        tensors: by key.

    Returns:
        ``tensors``: type and shape by key; ``buffers``: keys of those that are no parameters;
        ``frozen``: keys of parameters that do not train; ``strides``: those of the tensors that
        do not lie in memory row by row, for instance channels last.
    """
    parameters = {k: t for k, t in tensors.items() if isinstance(t, nn.Parameter)}
    strides = {k: list(t.stride()) for k, t in tensors.items() if _is_permuted(t)}
    return {
        "tensors": {key: describe(t) for key, t in tensors.items()},
        "buffers": [key for key in tensors if key not in parameters],
        "frozen": [key for key, t in parameters.items() if not t.requires_grad],
        **({"strides": strides} if strides else {}),
    }


def shapes(entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by key, from a document's table."""
    found = {}
    for key, words in entry["tensors"].items():
        sizes = words.partition("[")[2].rstrip("]")
        found[key] = tuple(int(size) for size in sizes.split(",") if size.strip())
    return found


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file, without most zeros of tensors that are full of them.

    Raises:
        BankError: a type that the format does not know.
    """
    rows: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        row = _rows(tensor)
        rows[key] = row.clone() if row.data_ptr() in places else row
        places.add(row.data_ptr())
    stored, metadata = pack(rows)
    try:
        return save(stored, metadata)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        types = ", ".join(sorted({str(t.dtype) for t in rows.values()}))
        raise BankError(f"Cannot store tensors of types {types}: {error}.") from error


def read_tensors(
    path: Path,
    recorded: Mapping[str, Any],
    entry: Mapping[str, Any] | None = None,
    *,
    verify: bool,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read and hashed in one pass over its bytes.

    Args:
        path: the file.
        recorded: its ``bytes`` and ``sha256``.
        entry: the table that the tensors must agree with; parameters are made by it.
        verify: whether to compare the hash; size and table are always compared.

    Returns:
        By key, tensors in memory of their own (aligned as torch aligns it, since kernels may round
        by alignment).

    Raises:
        BankError: the file was altered, or holds no tensors or others than the table says.
    """
    digest = hashlib.sha256()
    with opened(path, recorded["bytes"]) as file:
        try:
            tensors = _read(file, recorded["bytes"], digest.update if verify else None)
        except _NO_TENSORS as error:
            raise BankError(
                f"{path} holds no tensors ({error}): it was damaged. "
                "Restore it from a copy, or save the task again."
            ) from error
    if verify and digest.hexdigest() != recorded["sha256"]:
        raise BankError(
            f"{path} is not the file that was saved: its SHA-256 is {digest.hexdigest()[:12]}…, "
            f"expected {recorded['sha256'][:12]}…. It was damaged, edited or taken from another "
            "bundle. Restore it from a copy, or save the task again."
        )
    return tensors if entry is None else _by_table(path, tensors, entry)


def _read(file: FileIO, size: int, update: Callable[[Any], None] | None) -> dict[str, Tensor]:
    """The format: 8 bytes with the length of the header, a JSON header, the tensors' bytes.

    Reading into the tensors' own memory takes one pass where safetensors takes two.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = file.read(length)
    if update is not None:
        update(start)
        update(header)
    places = json.loads(header)
    metadata = places.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    position = 0
    for name, place in sorted(places.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = place["data_offsets"]
        dtype, shape = _TYPES[place["dtype"]], place["shape"]
        if (
            begin != position
            or end - begin != math.prod(shape) * dtype.itemsize
            or min(shape, default=0) < 0
        ):
            raise ValueError(f"'{name}' lies at bytes {begin} to {end}")
        position = end
        if end > size - 8 - length:
            raise ValueError(f"'{name}' ends behind the end of the file")
        tensors[name] = tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            _fill(file, _memory(tensor), update)
    if position != size - 8 - length:
        raise ValueError(f"{size - 8 - length - position} bytes belong to no tensor")
    return unpack(tensors, metadata) if metadata else tensors


def _fill(file: FileIO, memory: memoryview, update: Callable[[Any], None] | None) -> None:
    for begin in range(0, len(memory), CHUNK):
        piece = memory[begin : begin + CHUNK]
        if file.readinto(piece) != len(piece):
            raise ValueError("the file ends too early")
        if update is not None:
            update(piece)


def _by_table(
    path: Path, tensors: dict[str, Tensor], entry: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Parameters and buffers as a table says, in its order.

    Raises:
        BankError: the tensors are others.
    """
    found = {key: describe(t) for key, t in tensors.items()}
    if found != entry["tensors"]:
        raise BankError(
            f"{path} holds other tensors than its bundle says: "
            f"{first_difference(entry['tensors'], found)}. It was taken from another bundle. "
            "Restore it from a copy, or save the task again."
        )
    strides, buffers = entry.get("strides", {}), set(entry["buffers"])
    frozen = set(entry["frozen"])
    result: dict[str, Tensor] = {}
    for key in entry["tensors"]:
        tensor = tensors[key]
        if key in strides:
            empty = torch.empty_strided(tensor.shape, strides[key], dtype=tensor.dtype)
            tensor = empty.copy_(tensor)
        is_buffer = key in buffers
        result[key] = tensor if is_buffer else nn.Parameter(tensor, requires_grad=key not in frozen)
    return result


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How two tables of descriptions differ, by the first name that does."""
    for name, words in expected.items():
        if name not in found:
            return f"'{name}' ({words}) is missing"
        if found[name] != words:
            return f"'{name}' is {found[name]}, expected {words}"
    extra = next((name for name in found if name not in expected), "")
    return f"'{extra}' is not expected"


def hash_values(tensor: Tensor) -> str:
    """A hash of a tensor's values, 128 bits in hexadecimal."""
    return hashlib.sha256(_memory(tensor.detach().cpu().contiguous())).hexdigest()[:32]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the CPU, where they are."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _is_permuted(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(order).is_contiguous()


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().cpu().contiguous()
    whole = rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
    return rows if whole else rows.clone()
