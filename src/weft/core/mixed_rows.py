"""A batch whose rows belong to different tasks: one forward for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import WeftError

from .adapter import Call
from .forms import Alone, form_of, skeleton
from .mixed_forward import MixedForward, MixedForwardError, rows_in
from .mixing import Group, Mixing
from .pool import Pool
from .rows import Answer, Arguments, select_output, select_rows
from .rowwise import RowsUnknownError
from .sites import named_tensors
from .state import TaskState

if TYPE_CHECKING:
    from .running import Runner


@final
class MixedRows:
    """Runs batches of rows of different tasks.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._forward = MixedForward()
        self._heads: dict[Hashable, Pool] = {}

    @property
    def mixing(self) -> Mixing:
        """What finds the rows in the structures of the model."""
        return self._forward.mixing

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
                self._forward.refuse(pool, error.how)
            return answers

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
        features: Tensor = self._forward.run(pool, base, groups, batch, call, read, writable)
        self._runner.has_run_on(*batch)
        side = self._taps(pool, states, groups, base, call)
        return self._heads_on(states, places, bounds, features, side)

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
                mine = {s: {"feature": rows_in(f, group)} for s, f in records.items()}
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
        return self._forward.run(pool, tensors[0], groups, ((features,), {}), Call(), _as_it_is)


def _as_it_is(output: Any) -> Any:
    return output


def _one(states: Mapping[str, TaskState], names: Sequence[str]) -> bool:
    """Whether tasks have one and the same head."""
    return len({id(states[name].head) for name in names}) == 1


def _versions(batch: Arguments) -> list[int]:
    """How often each tensor of a batch has been written to."""
    tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


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
