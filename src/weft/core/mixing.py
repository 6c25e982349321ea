"""One forward for rows of several tasks: which modules part the rows, and with which tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import WeftError

from .adapter import Call
from .drawing import drawn_rows
from .layout import THREE, Layout, layouts
from .pool import Pool
from .rows import Arguments, select_rows
from .rowwise import Parted, Range, RowsUnknownError, Run, Work
from .sites import evaluating
from .structure import Structure
from .units import Columns, Units

NEARLY_ALL = 0.9
"""The share of a network from which on tasks that own it run one by one."""

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
        output: Callable[[Any], Any] = lambda output: output,
        writable: frozenset[str] | None = None,
    ) -> Iterator[tuple[Structure, frozenset[Hashable]]]:
        """A structure that is bound to all groups of a batch, and how its modules part the rows.

        Args:
            pool: of structures.
            base: the tensors, by name, that groups have in common unless they say otherwise.
            groups: one after another, all rows of the batch.
            batch: the inputs.
            output: what is read of the output.
            writable: in training mode, names of the buffers that the forward may change.

        Raises:
            RowsUnknownError: the groups have to run apart.
        """
        complete = {**base, **groups[0].tensors}
        training = writable is not None
        found = self.layout(pool, complete, batch, groups[-1].stop, output, training=training)
        if not found:
            raise RowsUnknownError
        with pool.lease() as structure:
            structure.set_mode(training, writable or frozenset())
            structure.bind(complete)
            how = self._bind(structure, found, base, groups)
            yield structure, how

    # ---------------------------------------------------------------- layouts

    def layout(
        self,
        pool: Pool,
        tensors: Mapping[str, Tensor],
        batch: Arguments,
        rows: int,
        output: Callable[[Any], Any] = lambda output: output,
        *,
        training: bool = False,
    ) -> dict[str, Layout]:
        """Where rows are in the calls of a structure, found once for inputs of one kind.

        Args:
            pool: of structures.
            tensors: what to bind.
            batch: inputs of that kind.
            rows: how many.
            output: what is read of the output; its rows have to come first.
            training: the mode; what is random then is left out.

        Returns:
            By module; nothing if rows see one another.
        """
        kind = (training, _kind(batch, rows))
        known = self._layouts.setdefault(pool, {})
        found = known.get(kind)
        if found is not None:
            return found
        drawn = drawn_rows(batch, rows, len(THREE), seed=0)
        with pool.lease() as structure, torch.no_grad():
            structure.set_mode(training, frozenset())
            structure.bind(tensors)
            with evaluating(structure.module):

                def run(places: tuple[int, ...]) -> Any:
                    args, kwargs = select_rows(drawn, places, len(THREE))
                    return output(structure.run(args, kwargs, Call()))

                try:
                    found = layouts(structure.parts(), run)
                except (WeftError, torch.OutOfMemoryError):
                    raise
                except Exception:  # the base does not take such rows; tasks apart say why
                    found = {}
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
        own = size_of(column[0] for column in columns.values())
        if choice.task_by_task and own > NEARLY_ALL * size_of(base.values()):
            raise RowsUnknownError  # hardly anything is shared, and apart caches are used better
        index = _Index(groups)
        for name, table, attribute in choice.broadcast:
            table[attribute] = index.rows(columns[name], 1).squeeze(1)
        wanted = [
            (one, attribute, columns[name])
            for one in choice.at_once
            for name, _, attribute in one.slots
            if attribute != "num_batches_tracked"  # no kernel reads it
        ]
        gathered: dict[int, dict[str, Tensor]] = {}
        rows = index.all_rows([(column, one.each) for one, _, column in wanted])
        for (one, attribute, _), tensor in zip(wanted, rows, strict=True):
            gathered.setdefault(id(one), {})[attribute] = tensor
        for one in choice.at_once:
            one.unit.own[0] = gathered.get(id(one), {})
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
    shared = {name: tensor for name, tensor in unit.tensors() if name not in columns}
    guarded = structure.guarded
    ranges: dict[tuple[int, ...], list[Range]] = {}
    tensors: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    for number, group in enumerate(groups):
        mine = tuple(
            shared[place.tensor] if place.tensor in shared else columns[place.tensor][number]
            for place in unit.places
        )
        key = (number,) if apart else tuple(map(id, mine))
        if key not in tensors:  # each run has copies of what no forward may write to
            pairs = zip(unit.places, mine, strict=True)
            tensors[key] = tuple(t.clone() if p.tensor in guarded else t for p, t in pairs)
        before = ranges.setdefault(key, [])
        if before and before[-1][1] == group.start:
            before[-1] = (before[-1][0], group.stop)
        else:
            before.append((group.start, group.stop))
    return [Run(tuple(ranges[key]), mine) for key, mine in tensors.items()]


def size_of(tensors: Iterable[Tensor]) -> int:
    """How many numbers there are in some tensors."""
    return sum(tensor.numel() for tensor in tensors)


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
                kinds.setdefault((first.dtype, first.device, first.requires_grad), []).append(
                    number
                )
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
    autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (autocast, str(structure), *(_kind_of(leaf, rows) for leaf in leaves))


def _kind_of(leaf: Any, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf if isinstance(leaf, (bool, int, float, str)) else None)
    if leaf.shape[:1] != (rows,):
        return (leaf.dtype, leaf.device, leaf.shape)
    # A network may order rows by lengths or the like, which equal ones do not show.
    alike = not leaf.is_floating_point() and bool((leaf == leaf[:1]).all())
    return (leaf.dtype, leaf.device, leaf.shape[1:], alike)
