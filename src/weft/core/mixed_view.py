"""Several tasks as one module that takes each row's task as a tensor: one graph for all mixes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from torch import Tensor, nn

from weft.errors import DataError, LeaseError, PlanError, TaskError

from .adapter import Call
from .forms import form_of, skeleton
from .layout import Layout
from .mixing import Group, Mixing, differing
from .pool import Pool
from .rows import call_arguments, count_rows, select_output
from .rowwise import RowsUnknownError
from .sites import named_tensors
from .state import TaskState
from .structure import Structure
from .units import AtOnce

if TYPE_CHECKING:
    from .running import Runner


@dataclass(frozen=True)
class Choosing:
    """A structure whose units read stacked tensors of all tasks.

    Args:
        structure: what runs.
        units: with the names of their stacked tensors, by attribute.
    """

    structure: Structure
    units: Sequence[tuple[AtOnce, Mapping[str, str]]]

    def choose(self, stacks: nn.Module, task: Tensor) -> None:
        """Give every unit the tensors of each row's task.

        Args:
            stacks: holds the stacked tensors, (tasks, *shape) each.
            task: (rows,) indices of tasks.
        """
        for one, names in self.units:
            index = task if one.each == 1 else task.repeat_interleave(one.each)
            one.unit.own[0] = {
                attribute: stacks.get_buffer(name).index_select(0, index)
                for attribute, name in names.items()
            }


@final
class MixedView(nn.Module):
    """Several tasks as one module, ``view(x, task=indices)``, with one graph for all mixes.

    It is made by ``model.mixed_view(tasks)``. What the tasks own is stacked, a copy; what they
    share is the model's. Take a new view after training. One thread at a time runs it.

    Args:
        trunk: the structure of the base.
        heads: that of the heads, or None where tasks have none.
        stacks: the stacked tensors, by name.
        output: what heads read of the base's output.
        tasks: their names; ``task`` counts them from 0.
        release: called with nothing when the view is dropped.
    """

    def __init__(
        self,
        trunk: Choosing,
        heads: Choosing | None,
        stacks: Mapping[str, Tensor],
        output: str | int | Callable[[Any], Tensor] | None,
        tasks: tuple[str, ...],
        release: Callable[[], None],
    ) -> None:
        super().__init__()
        self.task_names = tasks
        self.structure = trunk.structure.module
        self.heads = None if heads is None else heads.structure.module
        for name, tensor in stacks.items():
            self.register_buffer(name, tensor)
        self._trunk = trunk
        self._heads = heads
        self._output = output
        self._lock = threading.Lock()
        self.training = False
        weakref.finalize(self, release).atexit = False

    def forward(self, *inputs: Any, task: Tensor, **kwargs: Any) -> Tensor:
        """The outputs of the heads.

        Args:
            inputs: of the base, rows first.
            task: (rows,) for each row the place of its task in ``task_names``.
            kwargs: keyword inputs of the base.

        Returns:
            (rows, ...), in eval mode.

        Raises:
            DataError: ``task`` has not one index for each row.
            TaskError: an index of no task.
            LeaseError: a forward is running, or a backward has not run yet.
        """
        if torch.compiler.is_compiling():
            self._trunk.choose(self, task)
            self._trunk.structure.begin(Call())
            features = select_output(self.structure(*inputs, **kwargs), self._output)
            if self._heads is None or self.heads is None:
                return features
            self._heads.choose(self, task)
            answer: Tensor = self.heads(features)
            return answer
        self._check(inputs, kwargs, task)
        if not self._lock.acquire(blocking=False):
            raise LeaseError("A forward of this view is running in another thread. Take another.")
        try:
            return self._run(inputs, kwargs, task)
        finally:
            self._lock.release()

    def _run(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], task: Tensor) -> Tensor:
        structure = self._trunk.structure
        if structure.busy or (self._heads is not None and self._heads.structure.busy):
            raise LeaseError(
                "A backward of this view has not run yet. Call backward() or drop its outputs."
            )
        self._trunk.choose(self, task)
        output = structure.run(inputs, kwargs, Call())
        features = select_output(output, self._output)
        if features is not output and torch.is_grad_enabled():
            structure.await_backward(features)
        if self._heads is None:
            return features
        self._heads.choose(self, task)
        answer: Tensor = self._heads.structure.run((features,), {}, Call())
        return answer

    def _check(self, inputs: Any, kwargs: Any, task: Tensor) -> None:
        rows = count_rows(inputs, kwargs)
        if task.shape != (rows,):
            raise DataError(
                f"One task per row: task has shape {tuple(task.shape)} for {rows} rows."
            )
        if rows and not 0 <= int(task.min()) <= int(task.max()) < len(self.task_names):
            raise TaskError(f"A task index is outside 0..{len(self.task_names) - 1}.")

    def train(self, mode: bool = True) -> MixedView:
        """Eval mode only.

        Raises:
            LeaseError: training mode is asked for.
        """
        if mode:
            raise LeaseError("A view of several tasks runs in eval mode. Train the model itself.")
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MixedView:  # noqa: ARG002
        raise LeaseError(
            "A view is not moved or converted. Move the model, model.to(...), and take a new view."
        )

    def __reduce__(self) -> NoReturn:
        raise LeaseError("A view is never copied or stored. Take a new one: model.mixed_view(...).")


def chooser(
    mixing: Mixing,
    pool: Pool,
    base: Mapping[str, Tensor],
    tasks: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, Layout],
    prefix: str,
) -> tuple[Choosing, dict[str, Tensor]]:
    """A structure that chooses each row's tensors, and these tensors, stacked.

    Args:
        mixing: knows the units of structures.
        pool: of structures; the caller gives the structure back.
        base: tensors that tasks have in common unless they say otherwise.
        tasks: by name, the tensors that each has in their place.
        found: by module, where rows are.
        prefix: of the names of stacked tensors.

    Raises:
        PlanError: what runs depends on the mix.
    """
    groups = [Group(i, i + 1, tensors) for i, tensors in enumerate(tasks.values())]
    structure = pool.acquire()
    structure.set_mode(False, frozenset())
    structure.bind({name: _constant(t) for name, t in {**base, **groups[0].tensors}.items()})
    units = mixing.units(structure)
    columns = differing(units, base, groups)
    try:
        choice = units.choose(columns, found)
        if choice.task_by_task or choice.broadcast or (columns and not found):
            first = (*choice.task_by_task, *(slot[0] for slot in choice.broadcast), "the base")[0]
            raise PlanError(_REASON.format(f"'{first.removesuffix(':')}'", next(iter(columns))))
    except (PlanError, RowsUnknownError) as error:
        pool.release(structure)
        if isinstance(error, PlanError):
            raise
        raise PlanError(_REASON.format("the base itself", next(iter(columns)))) from None
    stacks: dict[str, Tensor] = {}
    chosen = []
    for one in choice.at_once:
        names = {}
        for name, _, attribute in one.slots:
            names[attribute] = f"{prefix}{len(stacks)}"
            stacks[names[attribute]] = torch.stack([t.detach() for t in columns[name]])
        one.install(structure, nobodys=None)
        chosen.append((one, names))
    return Choosing(structure, chosen), stacks


_REASON = (
    "These tasks have no graph that is the same for all mixes: {} runs task by task, on as many "
    "rows as each task has, since '{}' differs. Tasks that differ in normalisation, scales, "
    "biases, low rank and heads of one form have one. Call the model, model(x, task=[...]), or "
    "export tasks one by one."
)


def _constant(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def mixed_view(
    runner: Runner, mixing: Mixing, states: Mapping[str, TaskState], example: Any
) -> MixedView:
    """A view of several tasks.

    Args:
        runner: of the model.
        mixing: knows the units of structures.
        states: by name, the tasks, in eval mode.
        example: inputs of the base.

    Raises:
        PlanError: what runs depends on the mix.
    """
    plans = [state.sharing for state in states.values()]
    pool = runner.pool(plans[0])
    if any(runner.pool(plan) is not pool for plan in plans):
        raise PlanError("Tasks with different adapters have no graph in common. View them apart.")
    for name, state in states.items():
        if state.task.taps:
            raise PlanError(f"The head of '{name}' reads side sites, which no graph has in common.")
        if not state.head_is_built:
            runner.dry_run(state, example)
    forms: dict[Hashable, str] = {}
    for name, state in states.items():
        forms.setdefault(form_of(state.head), name)
    if len(forms) > 1:
        one, other = list(forms.values())[:2]
        raise PlanError(
            f"The heads of '{one}' and '{other}' differ in form, so no graph computes both. Give "
            "tasks with heads of one form, or call the model, model(x, task=[...])."
        )
    batch = call_arguments((example,), {})
    rows = count_rows(*batch)
    first = next(iter(states.values()))
    base = runner.tensors_read(first)
    read = partial(select_output, which=runner.output)
    with torch.inference_mode(False), torch.no_grad():
        tensors = {name: runner.changes(state, base) for name, state in states.items()}
        complete = {**base, **next(iter(tensors.values()))}
        found = mixing.layout(pool, complete, batch, rows, read)
        trunk, stacks = chooser(mixing, pool, base, tensors, found, "trunk")
        leased = [(pool, trunk.structure)]
        heads = None
        if first.head is not None:
            with pool.lease() as structure:
                structure.bind(complete)
                features = read(structure.run(*batch, Call()))
            tops = {
                name: dict(named_tensors(nn.Sequential(state.head)))
                for name, state in states.items()
                if state.head is not None
            }
            whole = next(iter(tops.values()))
            head_pool = Pool(skeleton(nn.Sequential(first.head)), {})
            found = mixing.layout(head_pool, whole, ((features,), {}), rows)
            try:
                heads, more = chooser(mixing, head_pool, whole, tops, found, "head")
            except PlanError:
                pool.release(trunk.structure)
                raise
            stacks |= more
            leased.append((head_pool, heads.structure))

    def release() -> None:
        for its_pool, structure in leased:
            its_pool.release(structure)

    return MixedView(trunk, heads, stacks, runner.output, tuple(states), release)
