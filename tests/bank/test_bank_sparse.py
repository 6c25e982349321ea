"""Tensors with many zeros in files: exact, small, and refused when they do not fit together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.bank.sparse import pack, unpack
from weft.bank.tensors import read_tensors, table, to_bytes
from weft.errors import BankError

TYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.uint8, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def sparse(count: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A vector of which a share is not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=generator) * 100 + 1
    there = torch.rand(count, generator=generator) < density
    return (values * there).to(dtype)


def there_and_back(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Through a file, checked as a bundle's is."""
    data = to_bytes(tensors)
    path.write_bytes(data)
    recorded = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return read_tensors(path, recorded, table(tensors), verify=True)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every bit, NaN and the signs of zeros included."""
    if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()):
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 1.0])
def test_every_density_and_type_comes_back_bit_for_bit(
    density: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"a": sparse(4099, density, dtype), "b": sparse(4099, density, dtype, 1).view(1, -1)}
    found = there_and_back(tensors, tmp_path / "file")
    assert list(found) == ["a", "b"]
    assert all(same_bits(found[k], tensors[k]) for k in tensors)


def test_signs_of_zeros_and_what_is_not_a_number_survive(tmp_path: Path) -> None:
    values = sparse(5000, 0.1)
    values[7], values[8], values[9] = -0.0, float("nan"), float("-inf")
    odd = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    values[10:12] = odd  # other bit patterns of NaN
    image = sparse(4096, 0.1).view(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    mask = values != 0
    tensors = {"v": values, "p": nn.Parameter(image), "m": mask, "s": torch.zeros(())}
    found = there_and_back(tensors, tmp_path / "file")
    assert all(same_bits(found[k].detach(), tensors[k].detach()) for k in tensors)
    assert isinstance(found["p"], nn.Parameter)


@pytest.mark.parametrize(
    ("density", "bytes_each"),
    [
        (1.0, 4.0),
        (0.9, 4.0),
        (0.5, 2.0 + 1 / 8),
        (0.2, 0.8 + 1 / 8),
        (0.1, 0.5),
        (0.05, 0.25),
        (0.0, 1 / 255),
    ],
)
def test_the_smaller_of_the_forms_is_taken(density: float, bytes_each: float) -> None:
    count = 100_000
    tensor = torch.zeros(count)
    tensor[torch.randperm(count)[: int(density * count)]] = 1.5
    size = len(to_bytes({"w": tensor}))
    assert size == pytest.approx(bytes_each * count, abs=512)


def test_masks_take_a_bit_and_none_beside_their_weight() -> None:
    weight = sparse(80_000, 0.1)
    mask = weight != 0
    alone = len(to_bytes({"m": mask}))
    assert alone == pytest.approx(8_000, abs=512)
    half = torch.rand(80_000) < 0.5
    assert len(to_bytes({"m": half})) == pytest.approx(10_000, abs=512)
    both = len(to_bytes({"w": weight, "m": mask}))
    assert both - len(to_bytes({"w": weight})) < 128


def test_parts_do_not_take_the_names_of_tensors(tmp_path: Path) -> None:
    names = ("w|gaps", "w", "w|values", "w|gaps|")
    tensors = {name: sparse(5000, 0.1 if name == "w" else 1.0) for name in names}
    found = there_and_back(tensors, tmp_path / "file")
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_small_and_full_tensors_are_stored_as_they_are() -> None:
    tensors = {"small": torch.zeros(100), "full": torch.randn(1000), "flags": torch.ones(8) > 0}
    stored, metadata = pack(tensors)
    assert metadata is None
    assert stored == tensors


def forms(density: float, **changes: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    stored, metadata = pack({"w": sparse(5000, density)})
    assert metadata is not None
    said = json.loads(metadata["weft"])
    said["w"] |= changes
    return stored, {"weft": json.dumps(said)}


@pytest.mark.parametrize(
    ("density", "shape"),
    [
        *((0.3, shape) for shape in ([4990], [5001], [-5000], [5000, 2], [10**12])),
        *((0.1, shape) for shape in ([4500], [5300], [-5000], [5000, 2], [10**12])),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(density: float, shape: list[int]) -> None:
    stored, metadata = forms(density, shape=shape)
    with pytest.raises(ValueError, match="'w' has"):
        unpack(stored, metadata)
    stored, metadata = forms(density)
    values = stored["w|values"]
    with pytest.raises(ValueError, match="'w' has 4 values for"):
        unpack({**stored, "w|values": values[:4]}, metadata)
    part = "gaps" if density < 0.2 else "bits"
    with pytest.raises(ValueError, match=f"'w' has {part} of torch.float32"):
        unpack({**stored, f"w|{part}": values}, metadata)


@pytest.mark.parametrize("runs", [[0], [254], [255], [256], [254, 255, 509, 510, 511, 765], [9999]])
@pytest.mark.parametrize("behind", [0, 1, 254, 255, 256, 510, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_runs_of_zeros_of_any_length_come_back(
    runs: list[int], behind: int, dtype: torch.dtype
) -> None:
    pieces = [torch.cat([torch.zeros(run), torch.ones(1)]) for run in runs]
    tensor = torch.cat([*pieces, torch.zeros(behind), torch.zeros(5000)]).to(dtype)
    stored, metadata = pack({"w": tensor})
    assert metadata is not None
    assert set(json.loads(metadata["weft"])["w"]) >= {"gaps"}
    assert torch.equal(unpack(stored, metadata)["w"], tensor)


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    tensors = {"w": sparse(5000, 0.1)}
    data = bytearray(to_bytes(tensors))
    recorded = {"bytes": len(data), "sha256": hashlib.sha256(bytes(data)).hexdigest()}
    data[-10] ^= 1
    (tmp_path / "f").write_bytes(bytes(data))
    with pytest.raises(BankError, match=r"is not the file that was saved|holds no tensors"):
        read_tensors(tmp_path / "f", recorded, table(tensors), verify=True)
    (tmp_path / "f").write_bytes(bytes(data[:-5]))
    with pytest.raises(BankError, match="was cut short"):
        read_tensors(tmp_path / "f", recorded, table(tensors), verify=True)
    shape = to_bytes(tensors).replace(b"[5000]", b"[4900]")
    (tmp_path / "f").write_bytes(shape)
    with pytest.raises(BankError, match="holds no tensors"):
        read_tensors(tmp_path / "f", recorded, table(tensors), verify=False)
