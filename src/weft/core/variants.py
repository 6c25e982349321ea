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
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .memory import storage_of

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


_NO_DATA = torch.empty(0, device="meta")


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
        made: Variants = Tensor._make_subclass(Variants, _NO_DATA)
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


def value_for(task: int, value: Any) -> Any:
    """What a structure of values is for one task."""

    part = frozenset({task})
    return pytree.tree_map(lambda v: _value(v, part) if isinstance(v, Variants) else v, value)


class Together(TorchFunctionMode):
    """In this context torch functions take `Variants`.

    A write to memory divides nothing: where the tasks of one value would write different things,
    each part gets a copy, and whatever else still refers to the old memory is refused.

    Args:
        tasks: how many there are.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._abandoned: dict[int, Tensor] = {}
        self._tasks = tasks
        self._ran = 0
        self._apart = 0

    @property
    def share(self) -> float:
        """How many functions ran, of those that would have run for the tasks apart."""
        return self._ran / max(1, self._apart)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        self._ran += 1
        self._apart += self._tasks
        if not types and not self._abandoned:
            return func(*args, **given)
        # Most calls hold tensors and numbers; taking structures apart would cost more than they do.
        if all(map(_is_leaf, args)) and all(map(_is_leaf, given.values())):
            leaves, structure = [*args, *given.values()], None
        else:
            leaves, structure = pytree.tree_flatten((args, dict(given)))
        self._refuse_abandoned(leaves)
        partitions = [leaf.groups for leaf in leaves if isinstance(leaf, Variants)]
        if not partitions:
            return func(*args, **given)
        parts = common_parts(partitions)
        self._ran += len(parts) - 1
        target = self._target(func, args, given, parts)
        results: dict[Members, Any] = {}
        for part in parts:
            mine = [_value(leaf, part) if isinstance(leaf, Variants) else leaf for leaf in leaves]
            if target is not None:
                mine[0] = target[part]
            if structure is None:
                named = dict(zip(given, mine[len(args) :], strict=True))
                results[part] = func(*mine[: len(args)], **named)
            else:
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
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            if any(schema.is_mutable for schema in _schemas(func)):
                raise TasksPartError
            return None
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
            old = _value(args[0], part)
            if part not in args[0].groups:
                self._abandoned[storage_of(old)] = old
                old = old.clone()
            memory[part] = old
        return memory

    def _refuse_abandoned(self, leaves: list[Any]) -> None:
        for leaf in leaves if self._abandoned else ():
            tensors = leaf.groups.values() if isinstance(leaf, Variants) else (leaf,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and storage_of(tensor) in self._abandoned:
                    raise TasksPartError


def common_parts(partitions: Sequence[Mapping[Members, Any]]) -> list[Members]:
    """The coarsest division of the tasks that divides at least where each partition does."""
    first = partitions[0].keys()
    if all(partition.keys() == first for partition in partitions):
        return list(first)
    keys: dict[int, list[int]] = {}
    for partition in partitions:
        for number, members in enumerate(partition):
            for task in members:
                keys.setdefault(task, []).append(number)
    found: dict[Hashable, list[int]] = {}
    for task, key in keys.items():
        found.setdefault(tuple(key), []).append(task)
    return [frozenset(tasks) for tasks in found.values()]


def _schemas(func: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> list[Any]:
    if isinstance(func, OpOverload):
        return [func._schema]
    return [getattr(func, name)._schema for name in func.overloads()]


def _is_leaf(value: Any) -> bool:
    """Whether no tensor is inside of a value: numbers in a row, such as a stride, are a leaf."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(each, int) for each in value)
    return not isinstance(value, dict)


def _value(variants: Variants, part: Members) -> Tensor:
    """The value of some tasks that have it in common."""
    value = variants.groups.get(part)
    if value is None:
        value = next(v for whole, v in variants.groups.items() if part <= whole)
    return value


def _joined(results: Mapping[Members, Any]) -> Any:
    """The results for the parts of the tasks as one.

    Raises:
        TasksPartError: they differ in something else than the numbers in tensors, so that the
            forward may go on differently.
    """
    if all(type(result) is Tensor for result in results.values()):
        return _one(tuple(results), tuple(results.values()))
    flat = {part: pytree.tree_flatten(result) for part, result in results.items()}
    structures = [structure for _, structure in flat.values()]
    if any(structure != structures[0] for structure in structures):
        raise TasksPartError
    columns = zip(*(leaves for leaves, _ in flat.values()), strict=True)
    return pytree.tree_unflatten([_one(tuple(results), c) for c in columns], structures[0])


def _one(parts: tuple[Members, ...], column: tuple[Any, ...]) -> Any:
    first = column[0]
    if isinstance(first, Tensor) and all(
        isinstance(v, Tensor) and v.shape == first.shape and v.dtype == first.dtype for v in column
    ):
        return Variants.of(dict(zip(parts, column, strict=True)))
    what = [(v.shape, v.dtype) if isinstance(v, Tensor) else (type(v), v) for v in column]
    alike: list[tuple[Any, Members]] = []
    for part, description in zip(parts, what, strict=True):
        for place, (known, members) in enumerate(alike):
            if _same(known, description):
                alike[place] = (known, members | part)
                break
        else:
            alike.append((description, part))
    if len(alike) > 1:
        raise TasksPartError([members for _, members in alike])
    return first


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays of numpy, for instance
        return False
