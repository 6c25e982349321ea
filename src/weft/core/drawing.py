"""Inputs and tensors drawn at random, to find out and to check what a network does with rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .rows import Arguments


def drawn_rows(batch: Arguments, rows: int, count: int, seed: int) -> Arguments:
    """Rows like those of a batch, as unlike one another as can be had.

    They are made of the batch's own rows, moved within themselves, so that numbers keep their
    range and indices stay valid; numbers that are all the same are drawn anew.

    Args:
        batch: inputs, rows first.
        rows: how many it has.
        count: how many to make.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (rows,):
            return tensor
        if tensor.is_floating_point() and _is_constant(tensor):
            return torch.randn(count, *tensor.shape[1:], generator=generator).to(tensor)
        chosen = _unlike(tensor, count)
        moved = [int(i) for i in torch.randint(0, 1 << 16, (count,), generator=generator)]
        if seed == 0:
            moved = list(range(count))
        return torch.stack([_moved(tensor[c], by) for c, by in zip(chosen, moved, strict=True)])

    drawn: Arguments = pytree.tree_map_only(Tensor, draw, batch)
    return drawn


def varied(batch: Arguments) -> Arguments:
    """A batch in which numbers that are all the same, zeros for instance, are drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not _is_constant(tensor):
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    drawn: Arguments = pytree.tree_map_only(Tensor, draw, batch)
    return drawn


def _is_constant(tensor: Tensor) -> bool:
    """Whether there is nothing to see in numbers: they are equal, or some are not finite."""
    if not tensor.numel() or not bool(tensor.isfinite().all()):
        return True
    return bool(tensor.amax() == tensor.amin())


def _unlike(tensor: Tensor, count: int) -> list[int]:
    """So many places of rows, those of different rows first."""
    found = [0]
    for row in range(1, len(tensor)):
        if len(found) < count and all(not torch.equal(tensor[row], tensor[r]) for r in found):
            found.append(row)
    return [found[i % len(found)] for i in range(count)]


def _moved(row: Tensor, by: int) -> Tensor:
    return row.roll(by, -1) if row.dim() else row


def disturbed(
    tensors: Mapping[str, Tensor], known: dict[int, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Other values in the place of a task's, so that no two tasks are alike by chance.

    Args:
        tensors: by name.
        known: by the identity of a tensor, what it has become; the same for all who hold it.
        generator: of the random numbers.
    """

    def other(tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or not tensor.dim():
            return tensor  # switches stay as they are
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        if bool((tensor > 0).all()):  # variances and the like stay positive
            return tensor * (0.3 * noise).exp()
        return tensor + 0.1 * (tensor.abs().mean() + 0.1) * noise

    for tensor in tensors.values():
        if id(tensor) not in known:
            known[id(tensor)] = other(tensor.detach())
    return {name: known[id(tensor)] for name, tensor in tensors.items()}
