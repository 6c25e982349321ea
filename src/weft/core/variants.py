"""Tensors that differ between tasks: one forward for all tasks computes what they share once.

An ordinary forward runs with `Variants` in the place of tensors that differ between tasks. Whatever
torch function meets one runs once for every distinct combination of its arguments, and returns
`Variants` again; what meets none runs as ever. So nothing needs to be known about the network: a
trunk, a branch, a residual connection is computed once for all tasks for which it is the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Members = frozenset[int]
"""The numbers of some tasks."""


class TasksPartError(Exception):
    """The forward goes on by a value that differs between tasks: they have to run apart.

    Args:
        parts: which tasks may go on together, if that is known.
        wrapped_helps: whether they may all go on together if the inputs are variants, too.
    """

    def __init__(self, parts: Sequence[Members] = (), *, wrapped_helps: bool = False) -> None:
        super().__init__(f"tasks part into {[sorted(part) for part in parts]}")
        self.parts = parts
        self.wrapped_helps = wrapped_helps


@final
class Variants(Tensor):
    """A tensor with a value for each task; tasks that have it in common have one value.

    It has no data of its own (its device is "meta"): what goes around torch's function protocol
    fails instead of computing with some task's value.
    """

    groups: dict[Members, Tensor]

    @staticmethod
    def of(groups: Mapping[Members, Tensor]) -> Variants:
        """The variants with these values.

        Args:
            groups: by tasks, their value; every task in one of them.
        """
        like = next(iter(groups.values())).detach()
        made: Variants = Tensor._make_subclass(Variants, torch.empty_like(like, device="meta"))
        made.groups = dict(groups)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        raise TasksPartError  # met outside of `Together`, where nothing knows what to do


def all_values(value: Any) -> Any:
    """A structure of values with all tasks' in the places of variants."""

    def spread(leaf: Any) -> Any:
        return list(leaf.groups.values()) if isinstance(leaf, Variants) else leaf

    return pytree.tree_map(spread, value)


def value_for(task: int, value: Any) -> Any:
    """What a structure of values is for one task."""

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Variants):
            return leaf
        return next(tensor for part, tensor in leaf.groups.items() if task in part)

    return pytree.tree_map(pick, value)


class Together(TorchFunctionMode):
    """In this context torch functions take `Variants`.

    A write to memory divides nothing: where the tasks of one value would write different things,
    each part gets a copy, and whatever else still refers to the old memory is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._abandoned: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if not types and not self._abandoned:
            return func(*args, **given)
        leaves, structure = pytree.tree_flatten((args, dict(given)))
        variants = {i: leaf.groups for i, leaf in enumerate(leaves) if isinstance(leaf, Variants)}
        self._refuse_abandoned(leaves)
        if not variants:
            return func(*args, **given)
        parts = common_parts(list(variants.values()))
        target = self._target(func, args, given, parts)
        results: dict[Members, Any] = {}
        for part in parts:
            task = next(iter(part))
            mine = [
                value_for(task, leaf) if i in variants else leaf for i, leaf in enumerate(leaves)
            ]
            if target is not None:
                mine[0] = target[part]
            values, named = pytree.tree_unflatten(mine, structure)
            results[part] = func(*values, **named)
        if target is None:
            return _joined(results)
        args[0].groups = target
        return args[0]

    def _target(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: list[Members]
    ) -> dict[Members, Tensor] | None:
        """By part, the memory that a function writes to; None if it writes to none.

        Raises:
            TasksPartError: it writes what differs to memory that tasks share and go on to share.
        """
        name = func.__name__
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        if name == "__set__" or kwargs.get("out") is not None:
            raise TasksPartError
        if not (in_place or kwargs.get("inplace")):
            return None
        if not args or not isinstance(args[0], Variants):
            raise TasksPartError(wrapped_helps=True)
        memory: dict[Members, Tensor] = {}
        for part in parts:
            old: Tensor = value_for(next(iter(part)), args[0])
            if part not in args[0].groups:
                self._abandoned[_storage(old)] = old
                old = old.clone()
            memory[part] = old
        return memory

    def _refuse_abandoned(self, leaves: list[Any]) -> None:
        for leaf in leaves if self._abandoned else ():
            tensors = leaf.groups.values() if isinstance(leaf, Variants) else (leaf,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and _storage(tensor) in self._abandoned:
                    raise TasksPartError


def common_parts(partitions: Sequence[Mapping[Members, Any]]) -> list[Members]:
    """The coarsest division of the tasks that divides at least where each partition does."""
    keys: dict[int, list[int]] = {}
    for partition in partitions:
        for number, members in enumerate(partition):
            for task in members:
                keys.setdefault(task, []).append(number)
    found: dict[Hashable, list[int]] = {}
    for task, key in keys.items():
        found.setdefault(tuple(key), []).append(task)
    return [frozenset(tasks) for tasks in found.values()]


def _joined(results: Mapping[Members, Any]) -> Any:
    """The results for the parts of the tasks as one.

    Raises:
        TasksPartError: they differ in something else than the numbers in tensors, so that the
            forward may go on differently.
    """
    flat = {part: pytree.tree_flatten(result) for part, result in results.items()}
    structures = [structure for _, structure in flat.values()]
    if any(structure != structures[0] for structure in structures):
        raise TasksPartError
    columns = zip(*(leaves for leaves, _ in flat.values()), strict=True)
    return pytree.tree_unflatten([_one(tuple(results), c) for c in columns], structures[0])


def _one(parts: tuple[Members, ...], column: tuple[Any, ...]) -> Any:
    what = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else (type(v), v) for v in column]
    alike: list[tuple[Any, Members]] = []
    for part, description in zip(parts, what, strict=True):
        for place, (known, members) in enumerate(alike):
            if known == description:
                alike[place] = (known, members | part)
                break
        else:
            alike.append((description, part))
    if len(alike) > 1:
        raise TasksPartError([members for _, members in alike])
    if isinstance(column[0], Tensor):
        return Variants.of(dict(zip(parts, column, strict=True)))
    return column[0]


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
