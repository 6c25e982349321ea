"""One forward for rows of several tasks: which modules part the rows, and with which tensors."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter import Call, RowwiseAdapter, SideAdapter
from .kernels import copies_weights, kernel_for
from .layout import Layout, layouts
from .pool import Pool
from .rows import Arguments, select_rows
from .rowwise import NOBODYS, Parted, Place, RowsUnknownError, Rowwise, Run, Work, run_adapter
from .structure import SLOT, Inserted, Structure

LARGE = 1 << 23
"""Numbers in the matrices of all tasks of a layer from which on it runs task by task."""

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
        self._parts: WeakKeyDictionary[Structure, _Parts] = WeakKeyDictionary()
        self._layouts: WeakKeyDictionary[Pool, dict[Any, dict[str, Layout]]] = WeakKeyDictionary()

    @contextmanager
    def bound(
        self,
        pool: Pool,
        complete: Mapping[str, Tensor],
        groups: Sequence[Group],
        batch: Arguments,
    ) -> Iterator[tuple[Structure, Hashable]]:
        """A structure that is bound to all groups of a batch, and how its modules part the rows.

        Args:
            pool: of structures.
            complete: every tensor that runs for the first group, by name.
            groups: one after another, all rows of the batch.
            batch: the inputs.

        Raises:
            RowsUnknownError: the groups have to run apart.
        """
        found = self._layout(pool, complete, batch, groups[-1].stop)
        with pool.lease() as structure:
            structure.set_mode(False, frozenset())
            structure.bind(complete)
            how = self._bind(structure, found, complete, groups)
            yield structure, how

    # ---------------------------------------------------------------- layouts

    def _layout(
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
                index = torch.tensor([chosen[place] for place in places])
                args, kwargs = select_rows(batch, index, rows)
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
        complete: Mapping[str, Tensor],
        groups: Sequence[Group],
    ) -> Hashable:
        """Bind, and say which modules part the rows and how."""
        known = self._parts.get(structure)
        if known is None:
            known = self._parts[structure] = _Parts(structure)
        columns = _columns(known, complete, groups)
        holding = known.holding(columns)
        if structure.guarded & columns.keys():
            raise RowsUnknownError
        index = _Index(groups)
        rowwise: dict[Around, Rowwise] = {}
        parted: dict[Around, int] = {}
        for around, slots in holding.items():
            own = {attribute: columns[name] for name, _, attribute in slots}
            unit = known.rowwise(around[0], own, found) if around else None
            place = _lowest(around, found)
            if unit is not None:
                rowwise[around] = unit
            elif place is not None:
                parted[around] = place
            elif all(column[0].shape[:1] == (1,) for column in own.values()):
                # A token or a position that broadcasts over rows: each row gets its task's.
                for name, table, attribute in slots:
                    table[attribute] = index.rows(columns[name], 1).squeeze(1)
            else:
                raise RowsUnknownError
        names = {around[place] for around, place in parted.items()}
        for around, unit in rowwise.items():
            if names.isdisjoint(around):
                each = _each(found[around[0]])
                unit.own[0] = {
                    attribute: index.rows(columns[name], each)
                    for name, _, attribute in holding[around]
                }
                for _, table, attribute in holding[around]:
                    table[attribute] = NOBODYS
                structure.replace(unit.inner, unit)
        outermost = {a[i] for a, i in parted.items() if names.isdisjoint(a[i + 1 :])}
        for name in outermost:
            self._part(structure, known, name, found, complete, columns, groups)
        return frozenset(outermost) | {(a[0], u.kernel) for a, u in rowwise.items()}

    @staticmethod
    def _part(
        structure: Structure,
        known: _Parts,
        name: str,
        found: Mapping[str, Layout],
        complete: Mapping[str, Tensor],
        columns: Mapping[str, Sequence[Tensor]],
        groups: Sequence[Group],
    ) -> None:
        unit = known.parted(name)
        shared = {
            place.tensor: complete[place.tensor].clone()
            if place.tensor in structure.guarded
            else complete[place.tensor]
            for place in unit.places
            if place.tensor not in columns
        }
        runs: list[Run] = []
        for number, group in enumerate(groups):
            tensors = tuple(
                shared[place.tensor] if place.tensor in shared else columns[place.tensor][number]
                for place in unit.places
            )
            last = runs[-1] if runs else None
            if last is not None and all(map(operator.is_, last.tensors, tensors)):
                runs[-1] = Run(last.start, group.stop, tensors)
            else:
                runs.append(Run(group.start, group.stop, tensors))
        unit.todo[:] = [Work(groups[-1].stop, found[name], runs)]
        unit.empty()
        structure.replace(unit.inner, unit)


class _Parts:
    """What is known about a structure, and the units made for it so far.

    Args:
        structure: of a network.
    """

    def __init__(self, structure: Structure) -> None:
        self._modules = structure.parts()
        self._names: dict[int, list[tuple[str, str]]] = {}
        for name, table, attribute in structure.slots:
            self._names.setdefault(id(table), []).append((name, attribute))
        self._slots: dict[str, list[tuple[Around, dict[str, Any], str]]] = {}
        self._parted: dict[str, Parted] = {}
        self._rowwise: dict[tuple[str, frozenset[str]], Rowwise | None] = {}
        holders = _holders(structure)
        for name, table, attribute in structure.slots:
            around = holders.get(id(table))
            if around is not None:
                self._slots.setdefault(name, []).append((around, table, attribute))

    def __contains__(self, name: object) -> bool:
        """Whether tasks that differ in a tensor differ in the trunk: side adapters are outside."""
        return name in self._slots

    def holding(self, names: Iterable[str]) -> dict[Around, list[tuple[str, dict[str, Any], str]]]:
        """By module that holds them, the slots of tensors: name, table and attribute."""
        found: dict[Around, list[tuple[str, dict[str, Any], str]]] = {}
        for name in names:
            for around, table, attribute in self._slots[name]:
                found.setdefault(around, []).append((name, table, attribute))
        return found

    def parted(self, name: str) -> Parted:
        """The unit that runs a module task by task."""
        unit = self._parted.get(name)
        if unit is None:
            module = self._modules[name]
            places = [
                Place(tensor, path, parameter, attribute)
                for path, child in module.named_modules()
                for parameter, table in ((True, child._parameters), (False, child._buffers))
                for tensor, attribute in self._names.get(id(table), ())
            ]
            unit = self._parted[name] = Parted(module, places)
        return unit

    def rowwise(
        self, name: str, own: Mapping[str, Sequence[Tensor]], found: Mapping[str, Layout]
    ) -> Rowwise | None:
        """The unit that runs a layer or an adapter for all rows at once, if there can be one.

        Args:
            name: of the module.
            own: by attribute, the tasks' tensors.
            found: where rows are.
        """
        if name not in found or not _each(found[name]):
            return None
        key = (name, frozenset(own))
        if key not in self._rowwise:
            self._rowwise[key] = self._new_rowwise(*key)
        unit = self._rowwise[key]
        if unit is not None and copies_weights(unit.inner, key[1]):
            matrices = own["weight"]
            if _each(found[name]) > 1 or len(matrices) * matrices[0].numel() > LARGE:
                return None
        return unit

    def _new_rowwise(self, name: str, own: frozenset[str]) -> Rowwise | None:
        module = self._modules[name]
        if isinstance(module, Inserted):
            adapter = module._modules["adapter"]
            direct = {*adapter._parameters, *adapter._buffers} if adapter is not None else ()
            if isinstance(adapter, RowwiseAdapter) and own.issubset(direct):
                return Rowwise(adapter, run_adapter)
            return None
        kernel = kernel_for(module, own)
        return None if kernel is None else Rowwise(module, kernel)


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
        index = self._index.get(each)
        if index is None:
            index = self._index[each] = self._index[1].repeat_interleave(each)
        return torch.stack(tuple(column)).index_select(0, index.to(column[0].device))


Around = tuple[str, ...]
"""Names of the modules around a tensor, from the inside to the outside, without the root."""


def _holders(structure: Structure) -> dict[int, Around]:
    """By the identity of a table of tensors, the modules around it; side adapters are outside."""
    modules = structure.parts()
    root = structure.module
    found: dict[int, Around] = {id(table): () for table in (root._parameters, root._buffers)}
    for name, module in modules.items():
        path = name.removesuffix(SLOT)
        if isinstance(module, Inserted):
            if isinstance(module.adapter, SideAdapter):
                continue
            tables = [(m._parameters, m._buffers) for m in module.adapter.modules()]
            first: Around = (name,)
        else:
            tables = [(module._parameters, module._buffers)]
            first = (name, f"{name}{SLOT}") if f"{name}{SLOT}" in modules else (name,)
        outside = []
        while path := path.rpartition(".")[0]:
            outside += [one for one in (path, f"{path}{SLOT}") if one in modules]
        for pair in tables:
            for table in pair:
                found[id(table)] = (*first, *outside)
    return found


def _columns(
    known: _Parts, complete: Mapping[str, Tensor], groups: Sequence[Group]
) -> dict[str, list[Tensor]]:
    """By name, each group's tensor, where they are not all the same."""
    columns: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys(name for group in groups for name in group.tensors):
        column = [group.tensors.get(name, complete[name]) for group in groups]
        if name in known and any(tensor is not column[0] for tensor in column):
            columns[name] = column
    return columns


def _lowest(around: Around, found: Mapping[str, Layout]) -> int | None:
    """The first of some modules for which it is known where rows are, if there is one."""
    return next((place for place, name in enumerate(around) if name in found), None)


def _each(layout: Layout) -> int:
    """How long each row is, if rows come first in all that a module takes and gives; else 0."""
    axes = [axis for axis in (*layout.inputs.axes, *layout.output.axes) if axis is not None]
    each = {axis.each for axis in axes if axis.place == 0}
    return each.pop() if len(each) == 1 and all(axis.place == 0 for axis in axes) else 0


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
