"""One forward for rows of several tasks: which modules part the rows, and with which tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter import Call
from .layout import Layout, layouts
from .pool import Pool
from .rows import Arguments, select_rows
from .rowwise import Parted, Range, RowsUnknownError, Run, Work
from .structure import Structure
from .units import Columns, Units

MOST_LAYOUTS = 64
"""Kinds of inputs whose layouts are kept."""


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one task.

    Args:
        start: the first row.
        stop: the row after the last one.
        tensors: by name, those that the task has in place of the base's.
    """

    start: int
    stop: int
    tensors: Mapping[str, Tensor]


class Mixing:
    """Binds structures to the tasks of all rows of a batch."""

    def __init__(self) -> None:
        self._units: WeakKeyDictionary[Structure, Units] = WeakKeyDictionary()
        self._layouts: WeakKeyDictionary[Pool, dict[Any, dict[str, Layout]]] = WeakKeyDictionary()

    @contextmanager
    def bound(
        self,
        pool: Pool,
        base: Mapping[str, Tensor],
        groups: Sequence[Group],
        batch: Arguments,
        writable: frozenset[str] | None = None,
    ) -> Iterator[tuple[Structure, frozenset[Hashable]]]:
        """A structure that is bound to all groups of a batch, and how its modules part the rows.

        Args:
            pool: of structures.
            base: the tensors, by name, that groups have in common unless they say otherwise.
            groups: one after another, all rows of the batch.
            batch: the inputs.
            writable: in training mode, names of the buffers that the forward may change.

        Raises:
            RowsUnknownError: the groups have to run apart.
        """
        complete = {**base, **groups[0].tensors}
        found = self.layout(pool, complete, batch, groups[-1].stop)
        with pool.lease() as structure:
            structure.set_mode(writable is not None, writable or frozenset())
            structure.bind(complete)
            how = self._bind(structure, found, base, groups)
            yield structure, how

    # ---------------------------------------------------------------- layouts

    def layout(
        self, pool: Pool, tensors: Mapping[str, Tensor], batch: Arguments, rows: int
    ) -> dict[str, Layout]:
        """Where rows are in the calls of a structure, found once for inputs of one kind."""
        kind = _kind(batch, rows)
        known = self._layouts.setdefault(pool, {})
        found = known.get(kind)
        if found is not None:
            return found
        chosen = _unlike(batch, rows)
        with pool.lease() as structure, torch.no_grad():
            structure.set_mode(False, frozenset())
            structure.bind(tensors)

            def run(places: tuple[int, ...]) -> None:
                args, kwargs = select_rows(batch, [chosen[place] for place in places], rows)
                structure.run(args, kwargs, Call())

            found = layouts(structure.parts(), run)
        while len(known) >= MOST_LAYOUTS:
            known.pop(next(iter(known)))
        known[kind] = found
        return found

    # ---------------------------------------------------------------- binding

    def _bind(
        self,
        structure: Structure,
        found: Mapping[str, Layout],
        base: Mapping[str, Tensor],
        groups: Sequence[Group],
    ) -> frozenset[Hashable]:
        """Bind, and say which modules part the rows and how."""
        units = self.units(structure)
        columns = differing(units, base, groups)
        if structure.guarded & columns.keys():
            raise RowsUnknownError
        choice = units.choose(columns, found, structure.moving)
        index = _Index(groups)
        for name, table, attribute in choice.broadcast:
            table[attribute] = index.rows(columns[name], 1).squeeze(1)
        wanted = [
            (one, attribute, columns[name])
            for one in choice.at_once
            for name, _, attribute in one.slots
            if columns[name][0].is_floating_point()  # no kernel reads how often a layer was trained
        ]
        own: dict[int, dict[str, Tensor]] = {}
        rows = index.all_rows([(column, one.each) for one, _, column in wanted])
        for (one, attribute, _), tensor in zip(wanted, rows, strict=True):
            own.setdefault(id(one), {})[attribute] = tensor
        for one in choice.at_once:
            one.unit.own[0] = own.get(id(one), {})
            one.install(structure)
        for name in choice.task_by_task:
            unit = units.parted(name)
            runs = _runs(unit, columns, groups, structure)
            unit.todo[:] = [Work(groups[-1].stop, found[name], runs)]
            unit.empty()
            structure.replace(unit.inner, unit)
        at_once = {(one.name, one.unit.kernel) for one in choice.at_once}
        return frozenset({*choice.task_by_task, *at_once, *(s[0] for s in choice.broadcast)})

    def units(self, structure: Structure) -> Units:
        """The units of a structure."""
        units = self._units.get(structure)
        if units is None:
            units = self._units[structure] = Units(structure)
        return units


def _runs(
    unit: Parted, columns: Columns, groups: Sequence[Group], structure: Structure
) -> list[Run]:
    """What a unit runs: groups that agree in all of its tensors together, unless it is training."""
    apart = structure.module.training
    shared = {
        name: tensor.clone() if name in structure.guarded else tensor
        for name, tensor in unit.tensors()
        if name not in columns
    }
    ranges: dict[tuple[int, ...], list[Range]] = {}
    tensors: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    for number, group in enumerate(groups):
        mine = tuple(
            shared[place.tensor] if place.tensor in shared else columns[place.tensor][number]
            for place in unit.places
        )
        key = (number,) if apart else tuple(map(id, mine))
        tensors[key] = mine
        before = ranges.setdefault(key, [])
        if before and before[-1][1] == group.start:
            before[-1] = (before[-1][0], group.stop)
        else:
            before.append((group.start, group.stop))
    return [Run(tuple(ranges[key]), mine) for key, mine in tensors.items()]


def differing(
    units: Units, base: Mapping[str, Tensor], groups: Sequence[Group]
) -> dict[str, tuple[Tensor, ...]]:
    """By name, each group's tensor, where they are not all the same."""
    names = list(groups[0].tensors)
    if all(list(group.tensors) == names for group in groups):
        columns = zip(*(group.tensors.values() for group in groups), strict=True)
    else:
        names = list(dict.fromkeys(name for group in groups for name in group.tensors))
        tensors = [{**base, **group.tensors} for group in groups]
        columns = zip(*(map(each.__getitem__, names) for each in tensors), strict=True)
    return {
        name: column
        for name, column in zip(names, columns, strict=True)
        if name in units and any(tensor is not column[0] for tensor in column)
    }


class _Index:
    """Gives each row its task's tensors.

    Args:
        groups: one after another, all rows.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        lengths = torch.tensor([group.stop - group.start for group in groups])
        self._index = {1: torch.arange(len(groups)).repeat_interleave(lengths)}

    def rows(self, column: Sequence[Tensor], each: int) -> Tensor:
        """(rows, *shape), or each row several times in a row.

        Args:
            column: of each group, its tensor.
            each: how many times.
        """
        return self._chosen(torch.stack(tuple(column)), each)

    def all_rows(self, columns: Sequence[tuple[Sequence[Tensor], int]]) -> list[Tensor]:
        """The same for many columns; vectors of one kind are joined at once, not one by one."""
        found: list[Tensor | None] = [None] * len(columns)
        kinds: dict[Any, list[int]] = {}
        for number, (column, each) in enumerate(columns):
            first = column[0]
            if first.dim() == 1:
                kinds.setdefault((first.dtype, first.device), []).append(number)
            else:
                found[number] = self.rows(column, each)
        for numbers in kinds.values():
            joined = torch.cat([t for number in numbers for t in columns[number][0]])
            lengths = [len(c) * c[0].shape[0] for c, _ in (columns[number] for number in numbers)]
            for number, part in zip(numbers, joined.split(lengths), strict=True):
                column, each = columns[number]
                found[number] = self._chosen(part.view(len(column), -1), each)
        return [tensor for tensor in found if tensor is not None]

    def _chosen(self, stacked: Tensor, each: int) -> Tensor:
        index = self._index.get(each)
        if index is None:
            index = self._index[each] = self._index[1].repeat_interleave(each)
        return stacked.index_select(0, index.to(stacked.device))


def _kind(batch: Arguments, rows: int) -> Any:
    """Inputs of one kind are laid out alike."""
    leaves, structure = pytree.tree_flatten(batch)
    described = [
        (leaf.dtype, leaf.device, leaf.shape[1:] if leaf.shape[:1] == (rows,) else leaf.shape)
        if isinstance(leaf, Tensor)
        else (type(leaf), repr(leaf))
        for leaf in leaves
    ]
    return (str(structure), *described)


def _unlike(batch: Arguments, rows: int) -> list[int]:
    """Three rows of a batch of at least two, unlike one another where possible."""
    tensors = [
        leaf.reshape(rows, -1)
        for leaf in pytree.tree_leaves(batch)
        if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)
    ]
    chosen = [0]
    for row in range(1, rows):
        if len(chosen) < 3 and all(
            any(not torch.equal(t[row], t[other]) for t in tensors) for other in chosen
        ):
            chosen.append(row)
    return (chosen * 3)[:3]
