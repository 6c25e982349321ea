"""Several tasks as one module that takes each row's task as a tensor: one graph for all mixes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import LeaseError, PlanError

from .adapter import Call
from .forms import form_of, skeleton
from .layout import Layout
from .mixing import Group, Mixing, differing
from .pool import Pool
from .rows import Arguments, call_arguments, select_output
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

    It is made by ``model.mixed_view(tasks)`` and holds copies of what the tasks own, stacked: it
    does not follow later training.

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
        """
        self._trunk.choose(self, task)
        self._trunk.structure.begin(Call())
        features = select_output(self.structure(*inputs, **kwargs), self._output)
        if self._heads is None or self.heads is None:
            return features
        self._heads.choose(self, task)
        answer: Tensor = self.heads(features)
        return answer

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
    except RowsUnknownError:
        raise PlanError(_REASON.format("the base itself", next(iter(columns)))) from None
    if choice.task_by_task or choice.broadcast:
        first = (*choice.task_by_task, *(slot[0] for slot in choice.broadcast))[0]
        raise PlanError(_REASON.format(f"'{first.removesuffix(':')}'", next(iter(columns))))
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
    batch = unlike(call_arguments((example,), {}))
    first = next(iter(states.values()))
    base = runner.tensors_read(first)
    with torch.inference_mode(False), torch.no_grad():
        tensors = {name: runner.changes(state, base) for name, state in states.items()}
        found = mixing.layout(pool, {**base, **next(iter(tensors.values()))}, batch, THREE)
        features = runner.features(first, *batch)
        trunk, stacks = chooser(mixing, pool, base, tensors, found, "trunk")
        leased = [(pool, trunk.structure)]
        heads = None
        if first.head is not None:
            tops = {
                n: dict(named_tensors(nn.Sequential(s.head))) for n, s in states.items() if s.head
            }
            whole = next(iter(tops.values()))
            head_pool = Pool(skeleton(nn.Sequential(first.head)), {})
            found = mixing.layout(head_pool, whole, unlike(((features,), {})), THREE)
            heads, more = chooser(mixing, head_pool, whole, tops, found, "head")
            stacks |= more
            leased.append((head_pool, heads.structure))

    def release() -> None:
        for its_pool, structure in leased:
            its_pool.release(structure)

    return MixedView(trunk, heads, stacks, runner.output, tuple(states), release)


THREE = 3


def unlike(example: Arguments) -> Arguments:
    """Three rows that are unlike one another, of the kind of an example.

    Numbers are drawn at random. Indices are moved within their row, so that they stay valid.
    """
    generator = torch.Generator().manual_seed(0)

    def rows(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        if tensor.is_floating_point():
            drawn = torch.randn(THREE, *tensor.shape[1:], generator=generator)
            return drawn.to(tensor)
        row = tensor[0]
        if row.dim() == 0:
            return tensor[torch.arange(THREE) % len(tensor)]
        return torch.stack([row.roll(i, -1) for i in range(THREE)])

    unlike_rows: Arguments = pytree.tree_map_only(Tensor, rows, example)
    return unlike_rows
