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

from .memory import bytes_of
from .state import TaskState
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
    """Knows which tensors are the same for tasks, from what they are made of.

    What is made anew for every forward is never looked into; what tasks own is looked into once.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Hashable]] = {}

    def mark(self, name: str, state: TaskState, own: Mapping[str, Tensor]) -> Hashable:
        """Equal for tasks whose tensors of this name are made of equal values in the same way.

        Args:
            name: of the tensor.
            state: the task.
            own: its own tensors by key.
        """
        patch = state.patches.get(name)
        if patch is not None:
            return (patch, *(self._content(own[key]) for key in patch.keys(name) if key in own))
        return self._content(own[name]) if name in own else None

    def _content(self, tensor: Tensor) -> Hashable:
        if tensor.is_inference():
            return id(tensor)  # it does not count how often it is written to
        here = id(tensor)
        known = self._known.get(here)
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        digest = hashlib.blake2b(bytes_of(tensor), digest_size=16).digest()
        mark = (digest, tensor.dtype, tensor.shape)
        alive = weakref.ref(tensor, lambda _: self._known.pop(here, None))
        self._known[here] = (alive, tensor._version, mark)
        return mark


def bound_together(
    states: Sequence[TaskState], composed: Sequence[Mapping[str, Tensor]], likeness: Likeness
) -> dict[str, Tensor]:
    """What a structure is bound to for several tasks at once.

    Args:
        states: the tasks.
        composed: of each task, every tensor that runs for it, by name.
        likeness: knows which are the same.
    """
    own = [state.own.to_dict() for state in states]
    bound: dict[str, Tensor] = {}
    for name, first in composed[0].items():
        found: dict[Hashable, list[int]] = {}
        for task, state in enumerate(states):
            found.setdefault(likeness.mark(name, state, own[task]), []).append(task)
        groups = {frozenset(tasks): composed[tasks[0]][name] for tasks in found.values()}
        bound[name] = first if len(groups) == 1 else Variants.of(groups)
    return bound


def divided(tasks: Sequence[int], parts: Sequence[Members]) -> list[list[int]]:
    """The tasks in parts that go on together; each alone if nothing is known about them."""
    together = [[task for task in tasks if task in part] for part in parts]
    together = [part for part in together if part]
    known = {task for part in together for task in part}
    if len(together) < 2:
        return [[task] for task in tasks]
    return [*together, *([task] for task in tasks if task not in known)]
