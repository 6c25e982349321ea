"""Which modules of a structure part the rows of different tasks, for tensors that differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapter import RowwiseAdapter, SideAdapter
from .kernels import copies_weights, has_hooks, kernel_for
from .layout import Layout
from .rowwise import NOBODYS, Parted, Place, RowsUnknownError, Rowwise, run_adapter
from .structure import SLOT, Inserted, Structure, keep_fused_paths_away

LARGE = 1 << 23
"""Numbers in the matrices of all tasks of a layer from which on it runs task by task."""

Columns = Mapping[str, Sequence[Tensor]]
"""By name, the tensor of each task, where they are not all the same."""

Around = tuple[str, ...]
"""Names of the modules around a tensor, from the inside to the outside, without the root."""

Slot = tuple[str, dict[str, Any], str]
"""A place that holds a tensor: the tensor's name, its table, and its attribute there."""


@dataclass(frozen=True)
class AtOnce:
    """A layer or an adapter that runs once for all rows.

    Args:
        name: of the module.
        unit: what stands in its place.
        each: how many rows of its input come from one row of the batch.
        slots: that differ.
    """

    name: str
    unit: Rowwise
    each: int
    slots: tuple[Slot, ...]

    def install(self, structure: Structure, nobodys: Tensor | None = NOBODYS) -> None:
        """Put the unit into the structure; nobody else reads the tensors that differ.

        Args:
            structure: that it belongs to.
            nobodys: what stands in their slots; None leaves them empty.
        """
        for _, table, attribute in self.slots:
            if nobodys is None:
                del table[attribute]
            else:
                table[attribute] = nobodys
        structure.replace(self.unit.inner, self.unit)


@dataclass(frozen=True)
class Choice:
    """Which modules part the rows, and how.

    Args:
        at_once: those that run once for all rows.
        task_by_task: names of those that run task by task.
        broadcast: slots of the root itself whose tensors broadcast over rows: a token, a position.
    """

    at_once: tuple[AtOnce, ...]
    task_by_task: tuple[str, ...]
    broadcast: tuple[Slot, ...]


class Units:
    """Finds and keeps the units of a structure.

    Args:
        structure: of a network.
    """

    def __init__(self, structure: Structure) -> None:
        self._modules = structure.parts()
        self._fused = structure.fused
        self._hooked: dict[str, bool] = {}
        self._names: dict[int, list[tuple[str, str]]] = {}
        for name, table, attribute in structure.slots:
            self._names.setdefault(id(table), []).append((name, attribute))
        self._slots: dict[str, list[tuple[Around, Slot]]] = {}
        self._parted: dict[str, Parted] = {}
        self._at_once: dict[tuple[str, frozenset[str]], Rowwise | None] = {}
        holders = _holders(structure)
        self._around = {around[0]: around for around in holders.values() if around}
        for name, table, attribute in structure.slots:
            around = holders.get(id(table))
            if around is not None:
                self._slots.setdefault(name, []).append((around, (name, table, attribute)))

    def __contains__(self, name: object) -> bool:
        """Whether tasks that differ in a tensor differ in the trunk: side adapters are outside."""
        return name in self._slots

    def choose(
        self,
        columns: Columns,
        found: Mapping[str, Layout],
        moving: frozenset[str] = frozenset(),
    ) -> Choice:
        """Which modules part the rows where these tensors differ.

        Args:
            columns: what differs.
            found: by module, where rows are.
            moving: paths of modules that compute statistics of each task's rows.

        Raises:
            RowsUnknownError: there are none.
        """
        at_once: dict[Around, AtOnce] = {}
        lowest: dict[Around, int] = {}
        broadcast: list[Slot] = []
        holding: dict[Around, list[Slot]] = {self._around[path]: [] for path in moving}
        holding |= self._holding(columns)
        for around, slots in holding.items():
            own = {attribute: columns[name] for name, _, attribute in slots}
            alone = not around or around[0] in moving
            unit = None if alone else self._rowwise(around[0], own, found)
            place = _lowest(around, found)
            if unit is not None:
                each = _each(found[around[0]])
                at_once[around] = AtOnce(around[0], unit, each, tuple(slots))
            elif place is not None:
                lowest[around] = place
            elif all(column[0].shape[:1] == (1,) for column in own.values()):
                broadcast += slots
            else:
                raise RowsUnknownError
        names = {around[place] for around, place in lowest.items()}
        if any(map(self._has_hooks_inside, names)):
            raise RowsUnknownError  # what a hook keeps would be that of one task
        outermost = {a[i] for a, i in lowest.items() if names.isdisjoint(a[i + 1 :])}
        inside = (one for around, one in at_once.items() if names.isdisjoint(around))
        return Choice(tuple(inside), tuple(outermost), tuple(broadcast))

    def _holding(self, names: Iterable[str]) -> dict[Around, list[Slot]]:
        """The slots of tensors, by the modules around them."""
        found: dict[Around, list[Slot]] = {}
        for name in names:
            for around, slot in self._slots[name]:
                found.setdefault(around, []).append(slot)
        return found

    def _has_hooks_inside(self, name: str) -> bool:
        if name not in self._hooked:
            inside = (m for m in self._modules[name].modules() if not isinstance(m, Inserted))
            self._hooked[name] = any(map(has_hooks, inside))
        return self._hooked[name]

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
            self._stay_called(unit)
        return unit

    def _stay_called(self, unit: nn.Module) -> None:
        if self._fused:
            unit.register_forward_hook(keep_fused_paths_away)

    def _rowwise(
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
        if key not in self._at_once:
            new = self._at_once[key] = self._new_rowwise(*key)
            if new is not None:
                self._stay_called(new)
        unit = self._at_once[key]
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


def _lowest(around: Around, found: Mapping[str, Layout]) -> int | None:
    """The first of some modules for which it is known where rows are, if there is one."""
    return next((place for place, name in enumerate(around) if name in found), None)


def _each(layout: Layout) -> int:
    """How long each row is, if rows come first in all that a module takes and gives; else 0."""
    axes = [axis for axis in (*layout.inputs.axes, *layout.output.axes) if axis is not None]
    each = {axis.each for axis in axes if axis.place == 0}
    return each.pop() if len(each) == 1 and all(axis.place == 0 for axis in axes) else 0
