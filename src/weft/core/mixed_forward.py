"""One forward for groups of rows of different tasks, which is checked before it is believed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import WeftError

from .adapter import Call
from .agreement import agree
from .drawing import disturbed, drawn_rows
from .mixing import Group, Mixing
from .pool import Pool
from .rows import Arguments, select_rows
from .rowwise import RowsUnknownError
from .sites import evaluating

COMPARED = 8
"""Tasks that are checked at once where a module parts rows for the first time."""

ROWS_EACH = 2
"""Rows of each of them."""


@final
class MixedForward:
    """Runs structures on groups of rows; ways to part rows that are new are compared first."""

    def __init__(self) -> None:
        self.mixing = Mixing()
        self._known: WeakKeyDictionary[Pool, _Checked] = WeakKeyDictionary()

    def refuse(self, pool: Pool, how: Hashable) -> None:
        """Part rows in this way no more."""
        self._of(pool).refused.add(how)

    def _of(self, pool: Pool) -> _Checked:
        return self._known.setdefault(pool, _Checked())

    def run(
        self,
        pool: Pool,
        base: Mapping[str, Tensor],
        groups: Sequence[Group],
        batch: Arguments,
        call: Call,
        read: Callable[[Any], Any],
        writable: frozenset[str] | None = None,
    ) -> Any:
        """What is read of the output for all groups, rows first.

        Args:
            pool: of structures.
            base: the tensors that groups have in common, by name.
            groups: the rows of each task, with the tensors that are its own; they follow one
                another.
            batch: the inputs of all rows.
            call: collects the records.
            read: what is read of an output.
            writable: in training mode, names of the buffers that the forward may change.

        Raises:
            RowsUnknownError: the groups have to run one by one.
            MixedForwardError: the forward failed, for whatever reason.
        """
        args, kwargs = batch
        known, training = self._of(pool), writable is not None
        for checked in (False, True):
            with self.mixing.bound(pool, base, groups, batch, read, writable) as (structure, how):
                if how in known.refused:
                    raise RowsUnknownError
                if how - structure.moving <= known.right[training]:
                    try:
                        output = structure.run(args, kwargs, call)
                    except (WeftError, torch.OutOfMemoryError):
                        raise
                    except Exception as error:
                        raise MixedForwardError(how) from error
                    value = read(output)
                    if value is not output and torch.is_grad_enabled():
                        structure.await_backward(value)
                    return value
            if not checked:
                self._check(pool, base, groups, batch, read, how, training)
        known.refused.add(how)  # the check cannot tell, so it is not made again
        raise RowsUnknownError

    def _check(
        self,
        pool: Pool,
        base: Mapping[str, Tensor],
        groups: Sequence[Group],
        batch: Arguments,
        read: Callable[[Any], Any],
        how: Hashable,
        training: bool,
    ) -> None:
        """Compare what units give with what tasks give on their own, once.

        Inputs are drawn, and tasks are disturbed: rows and tasks that are alike by chance show
        nothing. What is random in training, and statistics, are left out.

        Raises:
            RowsUnknownError: they differ.
        """
        rows, writable = groups[-1].stop, frozenset[str]() if training else None
        generator = torch.Generator().manual_seed(0)
        known = self._of(pool)
        for some in _chunks(groups, COMPARED):
            same: dict[int, Tensor] = {}
            count = ROWS_EACH * len(some)
            drawn = drawn_rows(batch, rows, count, seed=1)
            args, kwargs = drawn
            starts = range(0, count, ROWS_EACH)
            others = [
                Group(start, start + ROWS_EACH, disturbed(group.tensors, same, generator))
                for start, group in zip(starts, some, strict=True)
            ]
            with torch.no_grad():
                with self.mixing.bound(pool, base, others, drawn, read, writable) as (mixed, found):
                    with evaluating(mixed.module):
                        value = read(mixed.run(args, kwargs, Call()))
                for group in others:
                    args, kwargs = select_rows(drawn, range(group.start, group.stop), count)
                    with pool.lease() as structure, evaluating(structure.module):
                        structure.set_mode(training, frozenset())
                        structure.bind({**base, **group.tensors})
                        alone = read(structure.run(args, kwargs, Call()))
                    if not agree(rows_in(value, group), alone):
                        known.refused.add(how)
                        raise RowsUnknownError
            # A kernel that agrees shows that rows are where they were thought to be: its module may
            # also run task by task, as it does where its tensors are too large for a kernel.
            parted = (unit[0] for unit in found if isinstance(unit, tuple))
            known.right[training].update(found, parted)


@final
class MixedForwardError(Exception):
    """A forward for several tasks failed.

    Args:
        how: its modules part the rows.
    """

    def __init__(self, how: Hashable) -> None:
        super().__init__(how)
        self.how = how


@final
@dataclass
class _Checked:
    """What is known about the units of the structures of a pool.

    Args:
        right: units that agreed with tasks alone, in eval mode and in training mode.
        refused: ways to part rows that did not, or that failed where tasks alone did not.
    """

    right: tuple[set[Hashable], set[Hashable]] = field(default_factory=lambda: (set(), set()))
    refused: set[Hashable] = field(default_factory=set)


def rows_in(value: Any, group: Group) -> Any:
    """A group's rows of whatever holds tensors."""
    return pytree.tree_map_only(Tensor, lambda t: t[group.start : group.stop], value)


def _chunks(groups: Sequence[Group], size: int) -> list[Sequence[Group]]:
    """The groups in parts of about this size, none alone."""
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [[*parts[-2], *parts[-1]]]
    return parts
