"""Every task on one input: what several of them share is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter import Call
from .pool import Pool
from .rows import Arguments, select_output
from .state import TaskState
from .together import Likeness, SharedInputs, bound_together, divided
from .variants import TasksPartError, Together, Variants, value_for

if TYPE_CHECKING:
    from .running import Runner

HARDLY = 0.75
"""Tasks that save less than the rest of this share of their functions run faster apart."""


MOST_SETS = 1024
"""Sets of tasks that are remembered to share hardly anything."""


class OneInput:
    """Runs all tasks of a model on the same input.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._likeness = Likeness()
        self._wrapped: WeakSet[Pool] = WeakSet()
        self._hardly_shared: dict[frozenset[str], None] = {}

    def forget(self) -> None:
        """Let go of what earlier forwards showed about tasks that have changed since."""
        self._hardly_shared.clear()

    def _remember(self, names: Iterable[str]) -> None:
        while len(self._hardly_shared) >= MOST_SETS:
            self._hardly_shared.pop(next(iter(self._hardly_shared)), None)
        self._hardly_shared[frozenset(names)] = None

    def run(
        self, states: Mapping[str, TaskState], batch: Arguments, context: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Every task's output, in eval mode and without gradients.

        Args:
            states: by name, the tasks.
            batch: the inputs of the base.
            context: handed to adapters.

        Returns:
            By name, the outputs.
        """
        pools: dict[Pool, list[str]] = {}
        for name, state in states.items():
            pools.setdefault(self._runner.pool(state.sharing), []).append(name)
        outputs: dict[str, Any] = {}
        shared = SharedInputs([batch, batch])  # there may be more than one forward
        waiting = list(pools.values())
        while waiting:
            names = waiting.pop()
            group = {name: states[name] for name in names}
            if frozenset(names) in self._hardly_shared and len(names) > 1:
                waiting += [[name] for name in names]
                continue
            try:
                outputs |= self._together(group, batch, shared, context)
            except TasksPartError as error:
                parts = divided(range(len(names)), error.parts)
                waiting += [[names[i] for i in part] for part in parts]
            except Exception:
                # A scripted module or an extension cannot take variants. Alone each task runs as
                # ever; an error of the base itself shows there.
                if len(names) == 1:
                    raise
                self._remember(names)
                waiting += [[name] for name in names]
        return {name: outputs[name] for name in states}

    def _together(
        self,
        states: Mapping[str, TaskState],
        batch: Arguments,
        shared: SharedInputs,
        context: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Tasks of one kind of structure on the same input, by one forward.

        Raises:
            TasksPartError: they have to run apart.
        """
        if len(states) == 1:
            parts = dict.fromkeys(states, shared.take(batch))
            return self._runner.run(states, parts, context, training=False)[0]
        pool = self._runner.pool(next(iter(states.values())).sharing)
        try:
            return self._in_one_forward(pool, states, shared.take(batch), context)
        except TasksPartError as error:
            if not error.wrapped_helps:
                raise
        self._wrapped.add(pool)
        return self._in_one_forward(pool, states, shared.take(batch), context)

    def _in_one_forward(
        self,
        pool: Pool,
        states: Mapping[str, TaskState],
        batch: Arguments,
        context: Mapping[str, Any],
    ) -> dict[str, Any]:
        every = frozenset(range(len(states)))
        args, kwargs = batch
        if pool in self._wrapped:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: Variants.of({every: t}), batch)
        call, together = Call(context=context), Together(len(states))
        tasks = list(states.values())
        tensors = bound_together(tasks, [self._runner.compose(s) for s in tasks], self._likeness)
        with pool.lease() as structure:
            structure.set_mode(False, frozenset())
            structure.bind(tensors)
            with self._runner.shapes_explained(*batch):
                output = structure.run(args, kwargs, call, together)
            with together:
                features = select_output(output, self._runner.output)
                side = structure.taps(call.records)
        if together.share > HARDLY:
            self._remember(states)
        outputs: dict[str, Any] = {}
        for task, (name, state) in enumerate(states.items()):
            mine, taps = value_for(task, (features, side))
            state.build_head(mine, self._runner.reference())
            read = (mine, taps) if state.task.taps else (mine,)
            outputs[name] = mine if state.head is None else state.head(*read)
        return outputs
