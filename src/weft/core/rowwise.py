"""Units: the modules of a structure at which rows of different tasks part.

Rows of one task follow one another. A unit stands around tensors that differ between tasks and
runs either task by task on the task's rows or, where there is a kernel for it, once on all rows,
each with its task's tensors. All other modules run once on all rows and know nothing of tasks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .adapter import Call, RowwiseAdapter
from .kernels import Kernel, alone
from .layout import Axis, Layout, Rows
from .structure import Inserted, StandIn
from .variants import Variants

NOBODYS = Variants.of({})
"""Stands in slots whose tensors differ: who computes with it, instead of calling, is refused."""


class RowsUnknownError(Exception):
    """Where rows of different tasks part is unknown: the tasks have to run one by one."""


@dataclass(frozen=True)
class Place:
    """A slot inside of a unit.

    Args:
        tensor: the canonical name of its tensor.
        module: the path of the module that holds it, from the unit; "" for the unit itself.
        parameter: whether it is in the table of parameters; else in that of buffers.
        attribute: its name there.
    """

    tensor: str
    module: str
    parameter: bool
    attribute: str

    def table(self, unit: nn.Module) -> dict[str, Any]:
        """The table of the unit, or of a copy of it, that holds the slot."""
        holder = unit.get_submodule(self.module)
        tables: tuple[dict[str, Any], dict[str, Any]] = (holder._buffers, holder._parameters)
        return tables[self.parameter]


Range = tuple[int, int]
"""The first of some rows, and the row after the last one."""


@dataclass(frozen=True)
class Run:
    """The rows whose tasks agree in a unit.

    Args:
        ranges: of rows, in order.
        tensors: of the unit's places, in order.
    """

    ranges: tuple[Range, ...]
    tensors: tuple[Tensor, ...]


@dataclass
class Work:
    """What a unit does in the next forward.

    Args:
        rows: of the batch.
        layout: where the rows are in the unit's calls.
        runs: what it runs task by task.
    """

    rows: int
    layout: Layout
    runs: Sequence[Run]

    def split(self, numbers: int) -> list[Run]:
        """The runs, those of several ranges in parts where that costs less than moving rows.

        Args:
            numbers: in one row of the unit's inputs.
        """
        found = []
        for run in self.runs:
            rows = sum(stop - start for start, stop in run.ranges)
            # Calls with the same weight read it anew, and most kernels also reorder it.
            again = (len(run.ranges) - 1) * sum(tensor.numel() for tensor in run.tensors)
            if len(run.ranges) > 1 and again < rows * numbers:
                found += [Run((one,), run.tensors) for one in run.ranges]
            else:
                found.append(run)
        return sorted(found, key=lambda run: run.ranges)


EVERY_MODULE = frozenset(vars(nn.Module()))
OF_UNITS = frozenset({"places", "todo", "_slots", "kernel", "own"})
"""Attributes of the units themselves; others are those of the module inside."""


class _Around(StandIn, ABC):
    """What both kinds of units do: other attributes are those of the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @final
    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of their children.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @final
    def __setattr__(self, name: str, value: Any) -> None:
        # Parents also set attributes of their children, for instance a mask for one forward.
        if (
            name in OF_UNITS
            or name in EVERY_MODULE
            or "inner" not in self.__dict__.get("_modules", ())
        ):
            super().__setattr__(name, value)
        else:
            for module in self.like_inner():
                setattr(module, name, value)

    @abstractmethod
    def like_inner(self) -> Iterable[nn.Module]:
        """The module, and its copies if there are any."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, row by row as for the row's task."""


@final
class Parted(_Around):
    """Runs a module task by task.

    Args:
        inner: the module.
        places: its slots and those of its children.
    """

    def __init__(self, inner: nn.Module, places: Sequence[Place]) -> None:
        super().__init__(inner)
        self.places = tuple(places)
        self.todo: list[Work] = []  # one; a list, since modules are slow to write
        self._slots = [(inner, self._tables(inner))]  # of each module like the one inside

    def like_inner(self) -> Iterable[nn.Module]:
        return [module for module, _ in self._slots]

    def _tables(self, module: nn.Module) -> list[tuple[dict[str, Any], str]]:
        return [(place.table(module), place.attribute) for place in self.places]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is bound in the slots, by name."""
        for place, (table, attribute) in zip(self.places, self._slots[0][1], strict=True):
            yield place.tensor, table[attribute]

    def empty(self) -> None:
        """Leave no task's tensor in the slots: those of a run are bound for the run."""
        for table, attribute in self._slots[0][1]:
            table[attribute] = NOBODYS

    def hold(self, names: frozenset[str]) -> None:
        def copied(run: Run) -> Run:
            pairs = zip(self.places, run.tensors, strict=True)
            tensors = (t.detach().clone() if p.tensor in names else t for p, t in pairs)
            return Run(run.ranges, tuple(tensors))

        for work in self.todo:
            work.runs = [copied(run) for run in work.runs]

    def let_go(self) -> None:
        self.todo.clear()
        for _, tables in self._slots:
            for table, attribute in tables:
                table.pop(attribute, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, row by row as for the row's task.

        Raises:
            RowsUnknownError: the call is not like those that the layout was found by.
        """
        work = self.todo[0]
        if work.layout.one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return self._of_one_tensor(args[0], work, *work.layout.one_tensor)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        inputs = work.layout.inputs
        if structure != inputs.structure:
            raise RowsUnknownError
        pairs = list(zip(leaves, inputs.axes, strict=True))
        if any(axis and x.shape[axis.place] != work.rows * axis.each for x, axis in pairs):
            raise RowsUnknownError
        runs = work.split(sum(x.numel() // work.rows for x, axis in pairs if axis))
        outputs = []
        for number, run in enumerate(runs):
            mine = [x if axis is None else _part(x, axis, run.ranges) for x, axis in pairs]
            own_args, own_kwargs = pytree.tree_unflatten(mine, structure)
            outputs.append(self._run(number, run, own_args, own_kwargs))
        return outputs[0] if len(outputs) == 1 else _joined(outputs, runs, work.layout.output)

    def _of_one_tensor(self, x: Tensor, work: Work, before: Axis, after: Axis) -> Any:
        """The same where a module takes and gives one tensor, as most do."""
        if x.shape[before.place] != work.rows * before.each:
            raise RowsUnknownError
        runs = work.split(x.numel() // work.rows)
        parts = (_part(x, before, run.ranges) for run in runs)
        outputs = [self._run(i, runs[i], (part,), {}) for i, part in enumerate(parts)]
        return outputs[0] if len(outputs) == 1 else _in_order(outputs, runs, after)

    def _run(self, number: int, run: Run, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            module, tables = self._slots[0]
            _bind(tables, run.tensors)
            try:
                return alone(module, *args, **kwargs)
            finally:
                self.empty()
        # With gradients each run has a module of its own: checkpointing may run it again.
        while number >= len(self._slots) - 1:
            another = _copy(self._slots[0][0])
            self._slots.append((another, self._tables(another)))
        module, tables = self._slots[number + 1]
        for one, other in zip(module.modules(), self._slots[0][0].modules(), strict=True):
            one.training = other.training
        _bind(tables, run.tensors)
        return module(*args, **kwargs)


@final
class Rowwise(_Around):
    """Runs a layer, or an adapter around its site, once for all rows.

    Args:
        inner: the layer, or an adapter.
        kernel: computes it.
    """

    def __init__(self, inner: nn.Module, kernel: Kernel) -> None:
        super().__init__(inner)
        self.kernel = kernel
        self.own: list[Mapping[str, Tensor]] = [{}]

    def like_inner(self) -> Iterable[nn.Module]:
        return [self.inner]

    def hold(self, names: frozenset[str]) -> None:
        pass  # what runs at once writes to no buffer

    def let_go(self) -> None:
        self.own[0] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, row by row as for the row's task.

        Raises:
            RowsUnknownError: the inputs have another number of rows than there are tasks.
        """
        own = self.own[0]
        if not torch.compiler.is_compiling():
            rows = next(iter(own.values())).shape[0] if own else None
            for value in (*args, *kwargs.values()):
                if rows is not None and isinstance(value, Tensor) and value.shape[:1] != (rows,):
                    raise RowsUnknownError
        return self.kernel(self._modules["inner"], own, *args, **kwargs)


def run_adapter(
    adapter: RowwiseAdapter, own: Mapping[str, Tensor], call: Call, site: str, *args: Any
) -> Any:
    """The kernel of an adapter; the first of ``args`` is the site itself."""
    return adapter.forward_rows(own, call, site, *args)


def _part(value: Tensor, axis: Axis, ranges: Sequence[Range]) -> Tensor:
    """The rows of some ranges; no copy if it is one."""
    if len(ranges) == 1:
        start, stop = ranges[0]
        return value.narrow(axis.place, start * axis.each, (stop - start) * axis.each)
    return value.index_select(axis.place, _index(ranges, axis.each).to(value.device))


def _index(ranges: Iterable[Range], each: int) -> Tensor:
    return torch.cat([torch.arange(start * each, stop * each) for start, stop in ranges])


def _joined(outputs: list[Any], runs: Sequence[Run], rows: Rows) -> Any:
    """What the runs gave, in the order of rows."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    if any(structure != rows.structure for _, structure in flat):
        raise RowsUnknownError
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [
        column[0] if axis is None else _in_order(column, runs, axis)
        for column, axis in zip(columns, rows.axes, strict=True)
    ]
    return pytree.tree_unflatten(joined, rows.structure)


def _in_order(parts: Sequence[Tensor], runs: Sequence[Run], axis: Axis) -> Tensor:
    """The rows of all runs, in order."""
    value = torch.cat(tuple(parts), axis.place)
    ranges = [one for run in runs for one in run.ranges]
    if ranges == sorted(ranges):
        return value
    places = _index(ranges, axis.each)
    order = torch.empty_like(places)
    order[places] = torch.arange(len(places))
    return value.index_select(axis.place, order.to(value.device))


def _bind(tables: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]) -> None:
    for (table, attribute), tensor in zip(tables, tensors, strict=True):
        table[attribute] = tensor


def _copy(module: nn.Module) -> nn.Module:
    """A copy of an emptied module; what its adapters know of the forward stays common."""
    passages = (m.passage for m in module.modules() if isinstance(m, Inserted))
    memo: dict[int, Any] = {id(passage): passage for passage in passages}
    memo[id(NOBODYS)] = NOBODYS
    return copy.deepcopy(module, memo)
