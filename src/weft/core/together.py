"""Several tasks at once: inputs that they share, and tensors that they have in common."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import DataError

from .variants import Members, Variants


class SharedInputs:
    """Inputs that several forwards read; a forward that writes to them is found out.

    Args:
        parts: the inputs of each forward.
    """

    def __init__(self, parts: Iterable[tuple[Any, Any]]) -> None:
        seen: dict[int, Tensor] = {}
        shared: dict[int, Tensor] = {}
        for part in parts:
            tensors = [t for t in pytree.tree_leaves(part) if isinstance(t, Tensor)]
            mine = {id(t if t._base is None else t._base): t for t in tensors}
            shared |= {key: tensor for key, tensor in mine.items() if key in seen}
            seen |= mine
        # Inference tensors do not count how often they are written to: forwards get copies.
        self._copied = any(tensor.is_inference() for tensor in shared.values())
        self._versions = [] if self._copied else [(t, t._version) for t in shared.values()]

    def take(self, part: tuple[Any, Any]) -> tuple[Any, Any]:
        """The inputs of the next forward.

        Raises:
            DataError: a forward before it has written to them.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise DataError(
                "The base writes to its input, so the next task would see other values. Let it "
                "begin with a copy: x = x.clone()."
            )
        if self._copied:
            copied: tuple[Any, Any] = pytree.tree_map_only(Tensor, torch.clone, part)
            return copied
        return part


class Likeness:
    """Knows which tensors hold the same values, without comparing them again in every forward."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Hashable]] = {}

    def together(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor for all tasks, or variants where their values differ.

        Args:
            values: of the tasks, in order.
        """
        first = values[0]
        if all(value is first for value in values):
            return first
        found: dict[Hashable, tuple[Tensor, set[int]]] = {}
        for task, value in enumerate(values):
            found.setdefault(self._mark(value), (value, set()))[1].add(task)
        if len(found) == 1:
            return first
        groups: dict[Members, Tensor] = {frozenset(tasks): v for v, tasks in found.values()}
        return Variants.of(groups)

    def _mark(self, tensor: Tensor) -> Hashable:
        """Equal for tensors of equal values; one that does not count its writes is like itself."""
        if tensor.is_inference():
            return id(tensor)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.blake2b(content.numpy().data, digest_size=16).digest()
        mark = (digest, tensor.dtype, tensor.shape, tensor.device)
        here = id(tensor)
        alive = weakref.ref(tensor, lambda _: self._known.pop(here, None))
        self._known[here] = (alive, tensor._version, mark)
        return mark


def bound_together(
    composed: Sequence[Mapping[str, Tensor]], likeness: Likeness
) -> dict[str, Tensor]:
    """What a structure is bound to for several tasks at once.

    Args:
        composed: of each task, every tensor that runs for it, by name.
        likeness: knows which are the same.
    """
    return {
        name: likeness.together([tensors[name] for tensors in composed]) for name in composed[0]
    }


def divided(tasks: Sequence[int], parts: Sequence[Members]) -> list[list[int]]:
    """The tasks in parts that go on together; each alone if nothing is known about them."""
    together = [[task for task in tasks if task in part] for part in parts]
    together = [part for part in together if part]
    known = {task for part in together for task in part}
    if len(together) < 2:
        return [[task] for task in tasks]
    return [*together, *([task] for task in tasks if task not in known)]
