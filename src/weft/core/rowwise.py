"""Units: the modules of a structure at which rows of different tasks part.

Rows of one task follow one another. A unit stands around tensors that differ between tasks and
runs either task by task on the task's rows or, where there is a kernel for it, once on all rows,
each with its task's tensors. All other modules run once on all rows and know nothing of tasks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .adapter import Call, RowwiseAdapter
from .kernels import Kernel
from .layout import Axis, Layout
from .structure import Inserted
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


@dataclass(frozen=True)
class Run:
    """Neighbouring rows whose tasks agree in a unit.

    Args:
        start: the first row.
        stop: the row after the last one.
        tensors: of the unit's places, in order.
    """

    start: int
    stop: int
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


class _Around(nn.Module, ABC):
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
        self._modules_and_tables = [(inner, self._tables(inner))]

    def _tables(self, module: nn.Module) -> list[tuple[dict[str, Any], str]]:
        return [(place.table(module), place.attribute) for place in self.places]

    def empty(self) -> None:
        """Leave no task's tensor in the slots: those of a run are bound for the run."""
        for table, attribute in self._modules_and_tables[0][1]:
            table[attribute] = NOBODYS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, row by row as for the row's task.

        Raises:
            RowsUnknownError: the call is not like those that the layout was found by.
        """
        work = self.todo[0]
        leaves, structure = pytree.tree_flatten((args, kwargs))
        inputs = work.layout.inputs
        if structure != inputs.structure:
            raise RowsUnknownError
        self._check(leaves, inputs.axes, work.rows)
        outputs = []
        for number, run in enumerate(work.runs):
            mine = [_part(x, axis, run) for x, axis in zip(leaves, inputs.axes, strict=True)]
            own_args, own_kwargs = pytree.tree_unflatten(mine, structure)
            outputs.append(self._run(number, run, own_args, own_kwargs))
        return outputs[0] if len(outputs) == 1 else self._joined(outputs, work)

    def _run(self, number: int, run: Run, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            module, tables = self._modules_and_tables[0]
            _bind(tables, run.tensors)
            try:
                return module(*args, **kwargs)
            finally:
                self.empty()
        # With gradients each run has a module of its own: checkpointing may run it again.
        while number >= len(self._modules_and_tables) - 1:
            another = _copy(self._modules_and_tables[0][0])
            self._modules_and_tables.append((another, self._tables(another)))
        module, tables = self._modules_and_tables[number + 1]
        _bind(tables, run.tensors)
        return module(*args, **kwargs)

    @staticmethod
    def _joined(outputs: list[Any], work: Work) -> Any:
        rows = work.layout.output
        flat = [pytree.tree_flatten(output) for output in outputs]
        if any(structure != rows.structure for _, structure in flat):
            raise RowsUnknownError
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        joined = [
            column[0] if axis is None else torch.cat(column, axis.place)
            for column, axis in zip(columns, rows.axes, strict=True)
        ]
        return pytree.tree_unflatten(joined, rows.structure)

    @staticmethod
    def _check(leaves: list[Any], axes: tuple[Axis | None, ...], rows: int) -> None:
        for leaf, axis in zip(leaves, axes, strict=True):
            if axis is not None and leaf.shape[axis.place] != rows * axis.each:
                raise RowsUnknownError


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, row by row as for the row's task."""
        return self.kernel(self._modules["inner"], self.own[0], *args, **kwargs)


def run_adapter(
    adapter: RowwiseAdapter, own: Mapping[str, Tensor], call: Call, site: str, *args: Any
) -> Any:
    """The kernel of an adapter; the first of ``args`` is the site itself."""
    return adapter.forward_rows(own, call, site, *args)


def _part(value: Any, axis: Axis | None, run: Run) -> Any:
    if axis is None:
        return value
    start, length = run.start * axis.each, (run.stop - run.start) * axis.each
    return value.narrow(axis.place, start, length)


def _bind(tables: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]) -> None:
    for (table, attribute), tensor in zip(tables, tensors, strict=True):
        table[attribute] = tensor


def _copy(module: nn.Module) -> nn.Module:
    """A copy of an emptied module; what its adapters know of the forward stays common."""
    passages = (m.passage for m in module.modules() if isinstance(m, Inserted))
    memo: dict[int, Any] = {id(passage): passage for passage in passages}
    memo[id(NOBODYS)] = NOBODYS
    return copy.deepcopy(module, memo)
