"""Bundles of sparse networks: bytes on disk, and loading against a raw read of these bytes.

A loaded tensor is dense, so loading writes many times the bytes that it reads; the last columns
say what a raw read into new memory takes of the sparse file, and of the same tensors stored dense.

Run with: python bench/bank/sparse.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import weft
from resnet import ResNet34
from timing import machine, milliseconds, paired, ratio
from weft.bank.shared import shared_tensors
from weft.bank.tensors import read_tensors
from weft.core.masks import shared_key
from weft.methods.growth import largest


def pruned(base: nn.Module, sparsity: float) -> weft.MultiTaskModel:
    """A model whose shared weights are as sparse as said, by magnitude."""
    model = weft.MultiTaskModel(base, weft.disparse(base), example=torch.zeros(1, 3, 32, 32))
    model.add_task("a", weft.Classification(10))
    with torch.no_grad():
        for name in model.sharing.masked:
            weight = model.base.get_parameter(name)
            keep = largest(weight.abs(), round((1 - sparsity) * weight.numel()))
            weight.masked_fill_(~keep, 0)
            model.shared[shared_key(name)].copy_(keep)
    return model


def raw(path: Path) -> Callable[[], bytes]:
    """Reads the bytes of a file into new memory."""
    return path.read_bytes


def measure(base: nn.Module, sparsity: float, rounds: int) -> None:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = pruned(copy.deepcopy(base), sparsity)
        bank = weft.Bank(folder)
        bank.save(model)
        (file,) = (Path(folder) / "shared").glob("*")
        recorded = bank.info("a")["shared"]
        dense = sum(t.numel() * t.element_size() for t in shared_tensors(model).values())
        (Path(folder) / "dense").write_bytes(bytes(dense))
        seconds = paired(
            {
                "load": lambda: read_tensors(file, recorded, verify=False),
                "checked": lambda: read_tensors(file, recorded, verify=True),
                "raw": raw(file),
                "dense": raw(Path(folder) / "dense"),
            },
            rounds,
        )
        size = file.stat().st_size
        print(
            f"{sparsity:4.0%}: {size / 1e6:6.2f} MB of {dense / 1e6:.2f} MB ({size / dense:.1%}); "
            f"load {milliseconds(seconds['load'])}, with hash {milliseconds(seconds['checked'])}, "
            f"raw read {milliseconds(seconds['raw'])}, of the dense bytes "
            f"{milliseconds(seconds['dense'])}; "
            f"load / raw {ratio(seconds, 'load', 'raw')}, with hash / raw "
            f"{ratio(seconds, 'checked', 'raw')}, with hash / raw dense "
            f"{statistics.median(seconds['checked']) / statistics.median(seconds['dense']):.2f}"
        )


def main() -> None:
    """Several sparsities of one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    base = ResNet34()
    for sparsity in (0.0, 0.5, 0.7, 0.9, 0.98):
        measure(base, sparsity, given.rounds)


if __name__ == "__main__":
    main()
