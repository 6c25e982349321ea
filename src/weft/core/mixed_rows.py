"""A batch whose rows belong to different tasks: one forward for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import WeftError

from .adapter import Call
from .drawing import disturbed, drawn_rows
from .forms import Alone, form_of, skeleton
from .mixing import Group, Mixing
from .pool import Pool
from .rows import Answer, Arguments, select_output, select_rows
from .rowwise import RowsUnknownError
from .sites import evaluating, named_tensors
from .state import TaskState

if TYPE_CHECKING:
    from .running import Runner


COMPARED = 8
"""Tasks that are checked at once where a module parts rows for the first time."""

ROWS_EACH = 2
"""Rows of each of them."""

AGREEMENT = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""What may differ between a row in a mixed batch and alone, relative to the largest number."""


class MixedRows:
    """Runs batches of rows of different tasks.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.mixing = Mixing()
        self._heads: dict[Hashable, Pool] = {}
        self._checked: WeakKeyDictionary[Pool, _Checked] = WeakKeyDictionary()

    def forget(self) -> None:
        """Let go of tensors of tasks that are gone."""
        for pool in self._heads.values():
            pool.sweep()

    def run(
        self,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        batch: Arguments,
        rows: int,
        context: Mapping[str, Any],
        *,
        training: bool,
    ) -> list[Answer]:
        """The outputs of all rows.

        Args:
            states: by name, the tasks.
            places: by name, the places of their rows in the batch.
            batch: the inputs of the base, rows first.
            rows: how many there are.
            context: handed to adapters.
            training: the mode of the base.

        Returns:
            Each row's output in one of the answers.
        """
        pools: dict[Pool, list[str]] = {}
        for name, state in states.items():
            pools.setdefault(self._runner.pool(state.sharing), []).append(name)
        answers: list[Answer] = []
        for pool, names in pools.items():
            some = {name: states[name] for name in sorted(names, key=lambda n: _like(states[n]))}
            answers += self._of_one_pool(pool, some, places, batch, rows, context, training)
        return answers

    def _of_one_pool(
        self,
        pool: Pool,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        batch: Arguments,
        rows: int,
        context: Mapping[str, Any],
        training: bool,
    ) -> list[Answer]:
        order = [place for name in states for place in places[name]]
        parts = batch if order == list(range(rows)) else select_rows(batch, order, rows)
        apart = partial(self._one_by_one, states, places, parts, len(order), context, training)
        if len(states) < 2 or not self._can_mix(states, context, training):
            return apart()
        versions = _versions(parts)
        try:
            if not training:
                return self._together(pool, states, places, parts)
            return self._train_together(pool, states, places, parts)
        except (WeftError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Task by task the network runs as ever; an error of the base itself shows there.
            if _versions(parts) != versions:
                raise  # it wrote to its input and failed: there is nothing to begin again with
            answers = apart()
            if isinstance(error, MixedForwardError):
                self._checks(pool).refused.add(error.how)
            return answers

    def _checks(self, pool: Pool) -> _Checked:
        return self._checked.setdefault(pool, _Checked())

    def _can_mix(
        self, states: Mapping[str, TaskState], context: Mapping[str, Any], training: bool
    ) -> bool:
        """Whether one forward can be right: no context, and tensors are read in one way."""
        plans = [state.sharing for state in states.values()]
        reads_alike = len({plan.trains_shared for plan in plans}) == 1
        moves_alike = len(set(map(self._runner.writable, states.values()))) == 1
        grads = torch.is_grad_enabled()
        return not context and (reads_alike or not grads) and (moves_alike or not training)

    def _one_by_one(
        self,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        batch: Arguments,
        rows: int,
        context: Mapping[str, Any],
        training: bool,
    ) -> list[Answer]:
        """A forward for each task, on its rows."""
        parts = {}
        for name, (start, stop) in _bounds(states, places).items():
            parts[name] = select_rows(batch, range(start, stop), rows)
        outputs, _ = self._runner.run(states, parts, context, training=training)
        return [Answer((name,), places[name], outputs[name]) for name in states]

    # --------------------------------------------------------------- together

    def _train_together(
        self,
        pool: Pool,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        batch: Arguments,
    ) -> list[Answer]:
        """As `_together`, in training mode; statistics are those of each task's rows.

        Raises:
            RowsUnknownError: they have to run one by one; nothing has changed.
            DataError: a group of one row meets a batch normalisation that trains.
        """
        writable = self._runner.writable(next(iter(states.values())))
        with self._runner.statistics_kept_on_error(states.values()):
            return self._together(pool, states, places, batch, writable)

    def _together(
        self,
        pool: Pool,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        batch: Arguments,
        writable: frozenset[str] | None = None,
    ) -> list[Answer]:
        """One forward for all tasks of one kind of structure; their rows follow one another.

        Args:
            pool: of structures.
            states: by name, the tasks.
            places: by name, the places of their rows in the whole batch.
            batch: the inputs of these rows.
            writable: in training mode, names of the buffers that the forward may change.

        Raises:
            RowsUnknownError: they have to run one by one.
        """
        base = self._runner.tensors_read(next(iter(states.values())))
        bounds = _bounds(states, places)
        groups = [
            Group(*bounds[name], self._runner.changes(state, base))
            for name, state in states.items()
        ]
        call, read = Call(), partial(select_output, which=self._runner.output)
        features: Tensor = self._run(pool, base, groups, batch, call, read, writable)
        self._runner.has_run_on(*batch)
        side = self._taps(pool, states, groups, base, call)
        return self._heads_on(states, places, bounds, features, side)

    def _run(
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

        Raises:
            RowsUnknownError: the groups have to run one by one.
            MixedForwardError: the forward failed, for whatever reason.
        """
        args, kwargs = batch
        checks, training = self._checks(pool), writable is not None
        for checked in (False, True):
            with self.mixing.bound(pool, base, groups, batch, read, writable) as (structure, how):
                if how in checks.refused:
                    raise RowsUnknownError
                if how - structure.moving <= checks.right[training]:
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
        checks.refused.add(how)  # the check cannot tell, so it is not made again
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
        checks = self._checks(pool)
        for some in _chunks(groups, COMPARED):
            known: dict[int, Tensor] = {}
            count = ROWS_EACH * len(some)
            drawn = drawn_rows(batch, rows, count, seed=1)
            args, kwargs = drawn
            starts = range(0, count, ROWS_EACH)
            others = [
                Group(start, start + ROWS_EACH, disturbed(group.tensors, known, generator))
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
                    if not _agree(_rows_in(value, group), alone):
                        checks.refused.add(how)
                        raise RowsUnknownError
            # A kernel that agrees shows that rows are where they were thought to be: its module may
            # also run task by task, as it does where its tensors are too large for a kernel.
            parted = (unit[0] for unit in found if isinstance(unit, tuple))
            checks.right[training].update(found, parted)

    def _taps(
        self,
        pool: Pool,
        states: Mapping[str, TaskState],
        groups: Sequence[Group],
        base: Mapping[str, Tensor],
        call: Call,
    ) -> dict[str, dict[str, Tensor]]:
        """By task whose head reads side sites, what it reads."""
        found: dict[str, dict[str, Tensor]] = {}
        for (name, state), group in zip(states.items(), groups, strict=True):
            if state.task.taps:
                records = {s: r["feature"] for s, r in call.records.items() if "feature" in r}
                if any(len(feature) != groups[-1].stop for feature in records.values()):
                    raise RowsUnknownError
                mine = {s: {"feature": _rows_in(f, group)} for s, f in records.items()}
                with pool.lease() as structure:
                    structure.bind({**base, **group.tensors})
                    found[name] = structure.taps(mine)
        return found

    # ------------------------------------------------------------------ heads

    def _heads_on(
        self,
        states: Mapping[str, TaskState],
        places: Mapping[str, Sequence[int]],
        bounds: Mapping[str, tuple[int, int]],
        features: Tensor,
        side: Mapping[str, Mapping[str, Tensor]],
    ) -> list[Answer]:
        """The outputs of all heads; heads of one form run together."""
        forms: dict[Hashable, list[str]] = {}
        for name, state in states.items():
            if not state.head_is_built:
                start, stop = bounds[name]
                state.build_head(features[start:stop], self._runner.reference())
            forms.setdefault(name if state.task.taps else form_of(state.head), []).append(name)
        answers = []
        for form, names in forms.items():
            mine = _rows_of(features, [bounds[name] for name in names])
            head = states[names[0]].head
            where = [place for name in names for place in places[name]]
            if head is None:
                output: Any = mine
            elif len(names) == 1 or (_one(states, names) and not head.training):
                read = (mine, side[names[0]]) if names[0] in side else (mine,)
                output = head(*read)
            else:
                heads = [states[name].head for name in names]
                lengths = [bounds[name][1] - bounds[name][0] for name in names]
                try:
                    if isinstance(form, Alone):
                        raise RowsUnknownError
                    output = self._alike(form, heads, lengths, mine)
                except (RowsUnknownError, MixedForwardError):
                    parts = zip(heads, mine.split(lengths), names, strict=True)
                    answers += [Answer((n,), places[n], h(x)) for h, x, n in parts if h is not None]
                    continue
            answers.append(Answer(tuple(names), where, output))
        return answers

    def _alike(
        self,
        form: Hashable,
        heads: Sequence[nn.Module | None],
        lengths: Sequence[int],
        features: Tensor,
    ) -> Any:
        """Heads of one form on their rows, which follow one another.

        Raises:
            RowsUnknownError: they have to run one by one.
        """
        tensors = [dict(named_tensors(nn.Sequential(head))) for head in heads if head is not None]
        pool = self._heads.get(form)
        if pool is None:
            first = next(head for head in heads if head is not None)
            pool = self._heads[form] = Pool(skeleton(nn.Sequential(first)), {})
        groups, start = [], 0
        for own, length in zip(tensors, lengths, strict=True):
            groups.append(Group(start, start + length, own))
            start += length
        return self._run(pool, tensors[0], groups, ((features,), {}), Call(), _as_it_is)


class MixedForwardError(Exception):
    """A forward for several tasks failed.

    Args:
        how: its modules part the rows.
    """

    def __init__(self, how: Hashable) -> None:
        super().__init__(how)
        self.how = how


@dataclass
class _Checked:
    """What is known about the units of the structures of a pool.

    Args:
        right: units that agreed with tasks alone, in eval mode and in training mode.
        refused: ways to part rows that did not, or that failed where tasks alone did not.
    """

    right: tuple[set[Hashable], set[Hashable]] = field(default_factory=lambda: (set(), set()))
    refused: set[Hashable] = field(default_factory=set)


def _as_it_is(output: Any) -> Any:
    return output


def _one(states: Mapping[str, TaskState], names: Sequence[str]) -> bool:
    """Whether tasks have one and the same head."""
    return len({id(states[name].head) for name in names}) == 1


def _versions(batch: Arguments) -> list[int]:
    """How often each tensor of a batch has been written to."""
    tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _chunks(groups: Sequence[Group], size: int) -> list[Sequence[Group]]:
    """The groups in parts of about this size, none alone."""
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [[*parts[-2], *parts[-1]]]
    return parts


def _rows_in(value: Any, group: Group) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[group.start : group.stop], value)


def _like(state: TaskState) -> tuple[str, ...]:
    """Tasks that own the same tensors stand side by side, so that fewer runs share the others."""
    return tuple(state.patches)


def _bounds(
    states: Mapping[str, TaskState], places: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int]]:
    found, start = {}, 0
    for name in states:
        found[name] = (start, start + len(places[name]))
        start += len(places[name])
    return found


def _rows_of(features: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Some ranges of rows, one after another; no copy if they are neighbours."""
    start, stop = bounds[0][0], bounds[-1][1]
    if sum(b - a for a, b in bounds) == stop - start:
        return features[start:stop]
    return torch.cat([features[a:b] for a, b in bounds])


def _agree(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    mine, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(mine) == len(theirs) and all(map(_close, mine, theirs))


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    allowed = AGREEMENT.get(one.dtype, 0.1) * float(other.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)
