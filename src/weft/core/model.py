"""The model: one base, the shared tensors of its plan, and what each task owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import DataError, PlanError, TaskError, close_matches

from .adapter import Call, Records
from .ledger import Ledger, gate_scores, harden, make_ledger
from .rows import assemble, call_arguments, count_rows, select_output, select_rows
from .sharing import Sharing
from .sites import canonical_names, check_names, named_tensors, statistics_modules, tensor_slots
from .state import TaskState, TaskTable, TensorTable, private_copy
from .task import Task, check_task_name
from .view import SLOT, Pool, Structure, View, taps

Rows = str | Sequence[str] | Tensor
"""Which task: one name for all rows, one name per row, or one index into `task_names` per row."""


@dataclass(frozen=True)
class Step:
    """What one training step computes together.

    Args:
        outputs: by task, the head's output.
        records: by task, what adapters recorded.
        penalty: the plans' charges for these tasks, a scalar.
    """

    outputs: dict[str, Any]
    records: dict[str, Records]
    penalty: Tensor


class MultiTaskModel(nn.Module):
    """One base network and many tasks, each a set of own tensors, a head, a loss and a metric.

    Args:
        base: any module. It is never modified: the model works on a copy that shares its memory,
            except for tensors that the plan trains, which the model copies for real.
        sharing: the plan of the model's tasks, for instance ``weft.taps(base)``.
        example: one batch for the base (rows of one suffice), to size heads by a dry run.
        output: what heads read when the base returns a structure: a key, an attribute, an index,
            or a function of the base's output.

    Raises:
        PlanError: the plan names tensors or sites that the base does not have.
    """

    def __init__(
        self,
        base: nn.Module,
        sharing: Sharing,
        *,
        example: Any = None,
        output: str | int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sharing = self._checked(base, sharing)
        self.base = private_copy(base, sharing.train_shared)
        self.shared = TensorTable()
        self.tasks = TaskTable()
        self.output = output
        self.example = example
        self._slots = tensor_slots(self.base)
        self._statistics = {n for ns in statistics_modules(self.base).values() for n in ns}
        self._pools: dict[Sharing | None, Pool] = {}
        self._base_is_borrowed = True
        self._register_load_state_dict_pre_hook(self._before_loading)
        self._create_shared(sharing)

    # ------------------------------------------------------------------ tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order in which they were added; an integer task is an index into it."""
        return tuple(self.tasks)

    def add_task(self, name: str, task: Task, *, sharing: Sharing | None = None) -> None:
        """Add a task; no other task changes by a bit.

        Args:
            name: its name, usable as a folder's name.
            task: head, loss and metric, for instance ``weft.Classification(102)``.
            sharing: another plan for this task; only plans that leave shared tensors alone.

        Raises:
            TaskError: the name is taken or cannot be one.
            PlanError: the plan does not fit the base, or would create or train shared tensors.
        """
        check_task_name(name, self.tasks)
        if sharing is None or sharing is self.sharing:
            plan = self.sharing
        else:
            plan = self._checked(self.base, sharing)
            shares = {n for s in plan.adapters for n in self._adapter_tensors(plan, s)[1]}
            if not plan.only_owns or shares:
                raise PlanError(
                    f"The plan '{plan.method}' creates or trains shared tensors, which only the "
                    "model's own plan may: give it to MultiTaskModel(base, sharing)."
                )
        base = self._base_tensors()
        patches = plan.patches
        own: dict[str, Tensor] = {}
        for tensor_name, patch in patches.items():
            for key, value in patch.init(tensor_name, base[tensor_name]).items():
                own.setdefault(key, value)
        for site in plan.adapters:
            own.update(self._adapter_tensors(plan, site)[0])
        state = TaskState(task, plan, patches, own)
        self.install(name, state)

    def install(self, name: str, state: TaskState) -> None:
        """Add a task whose tensors exist already, for instance one loaded from a bank."""
        check_task_name(name, self.tasks)
        reference = next(iter(self._base_tensors().values()), torch.empty(0))
        state.to(reference.device)
        state.train(self.training)
        self.tasks.add(name, state)
        if self.example is not None and not state.head_is_built:
            try:
                self._dry_run(state)
            except BaseException:
                self.tasks.remove(name)
                raise

    def remove_task(self, name: str) -> None:
        """Drop a task with all that it owns."""
        self._state(name)
        self.tasks.remove(name)

    def head(self, task: str) -> nn.Module | None:
        """The task's head; None if the task uses the base's output itself.

        Raises:
            TaskError: the head is sized by a dry run that has not been possible yet.
        """
        state = self._state(task)
        if not state.head_is_built:
            raise TaskError(
                f"The head of '{task}' is not built yet: its input size is not known. "
                "Give the model an example, MultiTaskModel(base, sharing, example=x), "
                "or run one batch first."
            )
        return state.head

    # ---------------------------------------------------------------- running

    def forward(
        self, *inputs: Any, task: Rows, context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The outputs of the tasks' heads.

        Args:
            inputs: one tensor, tuple or dict of tensors with rows first, or the positional inputs
                of the base.
            task: one name for all rows, or one name or index per row.
            context: handed to adapters (labels, a prompt).
            kwargs: keyword inputs of the base.

        Returns:
            The head's output for one task. For a task per row: a tensor in row order if all rows'
            outputs have one shape, otherwise a list of them.

        Raises:
            TaskError: an unknown task.
            DataError: the number of names differs from the number of rows.
        """
        args, kwargs = call_arguments(inputs, kwargs)
        if isinstance(task, str):
            return self._run({task: (args, kwargs)}, context)[0][task]
        names = self._names(task, count_rows(args, kwargs))
        rows = {
            n: torch.tensor([i for i, m in enumerate(names) if m == n])
            for n in dict.fromkeys(names)
        }
        parts = {n: select_rows((args, kwargs), index) for n, index in rows.items()}
        outputs, _ = self._run(parts, context)
        return assemble(outputs, rows)

    def predict_all(self, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Every task's output on the same input.

        Args:
            inputs: as for a call of the model.
            kwargs: as for a call of the model.

        Returns:
            ``{task: output}``.
        """
        batch = call_arguments(inputs, kwargs)
        return self._run(dict.fromkeys(self.tasks, batch), None)[0]

    def step(
        self,
        batches: Mapping[str, Any],
        *,
        context: Mapping[str, Any] | None = None,
        charge: Mapping[str, float] | None = None,
    ) -> Step:
        """One training step's forward: outputs, records and penalties of several tasks together.

        Args:
            batches: by task, a tensor, tuple or dict of tensors with rows first.
            context: handed to adapters.
            charge: factors on the penalties of the tasks' plans; one task of a plan speaks for
                all of them. Default: 1.
        """
        parts = {name: call_arguments((x,), {}) for name, x in batches.items()}
        outputs, records = self._run(parts, context)
        return Step(outputs, records, self._penalty(records, charge or {}))

    def penalty(self, task: str) -> Tensor:
        """The charge of the task's plan for this task, a scalar to add to the loss.

        Raises:
            PlanError: the plan charges for what adapters record in a forward; use `step`.
        """
        plan = self._state(task).sharing
        for penalty in plan.penalties:
            if penalty.needs_records:
                raise PlanError(
                    f"'{plan.method}' charges for what a forward records. Use model.step"
                    "({task: batch}), which computes outputs and penalty together."
                )
        return self._penalty({task: {}}, {})

    def view(self, task: str) -> View:
        """The structure bound to one task's tensors: ``view(x)`` is its backbone output.

        In eval mode a view holds detached tensors, of one kind for all tasks, so that tasks share
        a compiled graph; bind ``model.tensors(task)`` to differentiate with respect to them. In
        training mode it holds those.
        """
        state = self._state(task)
        tensors = self._composed(state)
        if not self.training:
            buffers = {
                n for n, t in self._base_tensors().items() if not isinstance(t, nn.Parameter)
            }
            tensors = {
                n: t.detach() if n in buffers else nn.Parameter(t.detach(), requires_grad=False)
                for n, t in tensors.items()
            }
        statistics = self._trained_statistics(state)
        return View(self._pool(state.sharing), tensors, statistics, training=self.training)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """Every tensor that runs for the task, by name, differentiable: the whole truth."""
        return self._composed(self._state(task))

    # --------------------------------------------------------------- training

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """What fitting this task alone trains, head included.

        Raises:
            TaskError: the head is not built yet.
        """
        head = self.head(task)
        heads = [] if head is None else [p for p in head.parameters() if p.requires_grad]
        return [*self.trainable(task).values(), *heads]

    def trainable(self, task: str) -> dict[str, nn.Parameter]:
        """The task's own trainable tensors by key, without its head."""
        own = self._state(task).own
        return {k: p for k, p in own.items() if isinstance(p, nn.Parameter) and p.requires_grad}

    def shared_trainable(self) -> dict[str, nn.Parameter]:
        """The shared tensors that the model's plan trains, by base name or created key."""
        tensors = {**self._base_tensors(), **self.shared}
        return {k: p for k, p in tensors.items() if isinstance(p, nn.Parameter) and p.requires_grad}

    def plan(self, task: str) -> Sharing:
        """The plan that the task was made by."""
        return self._state(task).sharing

    # ----------------------------------------------------- storing and leaving

    def harden(self, task: str) -> None:
        """Make the task's gates final: a closed layer is shared again and stores nothing.

        Outputs do not change. `fit` does this at its end.
        """
        state = self._state(task)
        state.scores.update(gate_scores(state.patches, state.own))
        read = {key for name, patch in state.patches.items() for key in patch.keys(name)}
        added = {key: t for key, t in state.own.items() if key not in read}
        base = self._base_tensors()
        state.patches, own = harden(base, state.patches, {**self.shared, **state.own})
        state.own = TensorTable({**own, **added})

    def ledger(self, task: str) -> Ledger:
        """What the task owns, shares and costs, as it would be stored now."""
        state = self._state(task)
        patches, head = state.patches, state.head
        own = dict(state.own)
        return make_ledger(task, self.base, patches, own, state.scores, head)

    def fold(self, task: str) -> nn.Module:
        """A plain module of the base's class with the task baked in, without its head.

        Raises:
            PlanError: an adapter of the plan has no plain form.
        """
        state = self._state(task)
        tensors = {n: t.detach().clone() for n, t in self.tensors(task).items()}
        memo: dict[int, Any] = {
            id(t): nn.Parameter(tensors[n]) if isinstance(t, nn.Parameter) else tensors[n]
            for n, t in self._base_tensors().items()
        }
        plain = copy.deepcopy(self.base, memo)
        for site, insertion in state.sharing.adapters.items():
            inner = plain.get_submodule(site)
            adapter = insertion.build(inner)
            values = {n: tensors[site + SLOT + n] for n, _ in named_tensors(adapter)}
            adapter.load_state_dict(values)
            plain.set_submodule(site, adapter.fold(inner))
        return plain.train(self.training)

    # ---------------------------------------------------------------- inside

    def _checked(self, base: nn.Module, sharing: Sharing) -> Sharing:
        canonical = canonical_names(base)
        check_names(sharing.patches, canonical, f"'{sharing.method}' patches")
        check_names(sharing.train_shared, canonical, f"'{sharing.method}' trains")
        for name, patch in sharing.patches.items():
            if canonical[name] != name:
                raise PlanError(
                    f"'{name}' is tied to '{canonical[name]}'; patch it under that name."
                )
            if patch.needs_frozen_base and name in sharing.train_shared:
                raise PlanError(
                    f"The patch of '{name}' is only right over a frozen base, but the plan "
                    f"'{sharing.method}' trains that tensor. Use the residual form."
                )
        return sharing

    def _create_shared(self, sharing: Sharing) -> None:
        for key, created in sharing.created.items():
            value = created.value.detach().clone()
            self.shared[key] = nn.Parameter(value) if created.trains else value
        for site in sharing.adapters:
            for key, value in self._adapter_tensors(sharing, site)[1].items():
                self.shared[key] = value

    def _adapter_tensors(
        self, sharing: Sharing, site: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Initial own and shared tensors of the adapter at a site, by key."""
        try:
            inner = self.base.get_submodule(site)
        except AttributeError:
            known = dict(self.base.named_modules())
            hint = close_matches(site, known)
            raise PlanError(
                f"'{sharing.method}' inserts at '{site}': no such module.{hint}"
            ) from None
        adapter = sharing.adapters[site].build(inner)
        shared = adapter.shared_names()
        tensors = dict(named_tensors(adapter))
        own = {site + SLOT + n: t for n, t in tensors.items() if n not in shared}
        return own, {site + SLOT + n: t for n, t in tensors.items() if n in shared}

    def _state(self, task: str) -> TaskState:
        if not isinstance(task, str) or task not in self.tasks:
            have = ", ".join(self.tasks) or "none yet"
            hint = close_matches(str(task), self.tasks)
            raise TaskError(f"There is no task {task!r}. Tasks: {have}.{hint}")
        return self.tasks[task]

    def _names(self, task: Sequence[str] | Tensor, rows: int) -> list[str]:
        names = self.task_names
        if isinstance(task, Tensor):
            indices = task.tolist()
            if not isinstance(indices, list) or task.is_floating_point():
                raise TaskError(
                    "Integer tasks are one index per row, a LongTensor of shape (rows,)."
                )
            for i in indices:
                if not 0 <= i < len(names):
                    raise TaskError(f"Task index {i} is outside 0..{len(names) - 1}.")
            chosen = [names[i] for i in indices]
        else:
            chosen = list(task)
        if len(chosen) != rows:
            raise DataError(f"One task per row: found {len(chosen)} tasks for {rows} rows.")
        for name in dict.fromkeys(chosen):
            self._state(name)
        return chosen

    def _base_tensors(self) -> dict[str, Tensor]:
        return {name: table[attribute] for name, table, attribute in self._slots}

    def _composed(self, state: TaskState) -> dict[str, Tensor]:
        """The task's tensors: differentiable in grad mode, otherwise detached."""
        tensors = self._base_tensors()
        own = {**self.shared, **state.own}
        for name, patch in state.patches.items():
            tensors[name] = patch.compose(name, tensors[name], own)
        for site in state.sharing.adapters:
            tensors.update({k: t for k, t in own.items() if k.startswith(site + SLOT)})
        if not torch.is_grad_enabled():
            return {name: t.detach() for name, t in tensors.items()}
        return tensors

    def _trained_statistics(self, state: TaskState) -> frozenset[str]:
        owned = self._statistics & state.patches.keys()
        return frozenset(owned | (self._statistics & state.sharing.train_shared))

    def _pool(self, sharing: Sharing) -> Pool:
        # Plans without adapters run the same structure.
        key = sharing if sharing.adapters else None
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools.setdefault(key, Pool(self.base, sharing.adapters))
        return pool

    def _run(
        self,
        parts: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]],
        context: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, Records]]:
        outputs: dict[str, Any] = {}
        records: dict[str, Records] = {}
        states = {name: self._state(name) for name in parts}
        single = any(count_rows(*part) == 1 for part in parts.values())
        with self._statistics_kept_on_error(states.values(), single):
            for name, (args, kwargs) in parts.items():
                call = Call(context=context or {})
                outputs[name] = self._run_task(states[name], args, kwargs, call)
                records[name] = call.records
        return outputs, records

    def _run_task(
        self, state: TaskState, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
    ) -> Any:
        tensors = self._composed(state)
        trained = self._trained_statistics(state)
        with self._pool(state.sharing).lease() as structure:
            structure.set_mode(self.training, trained)
            if self.training:
                for name in structure.foreign_buffers(trained):
                    if name not in state.patches:
                        tensors[name] = structure.scratch(name, tensors[name])
            structure.bind(tensors)
            features = select_output(structure.run(args, kwargs, call), self.output)
            side = taps(structure, call.records) if state.task.taps else None
            self._check_reached(structure)
            if self.training:
                structure.hold_statistics(trained)
        if not state.head_is_built:
            state.build_head(features)
            state.train(self.training)
        if state.head is None:
            return features
        return state.head(features) if side is None else state.head(features, side)

    def _check_reached(self, structure: Structure) -> None:
        bypassed = structure.bypassed()
        if bypassed:
            raise PlanError(
                f"The adapter at '{bypassed[0]}' has no effect: its parent uses the module's "
                "tensors without calling it. Leave this site out, or patch its tensors instead."
            )

    @contextmanager
    def _statistics_kept_on_error(
        self, states: Iterable[TaskState], single: bool
    ) -> Iterator[None]:
        """Refuse a group too small for its batch norm before any statistics have changed.

        A batch norm refuses one value per channel only after earlier layers have updated their
        statistics; only groups of one row can meet this, so only they pay for a copy.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        if single and self.training:
            for state in states:
                tensors = {**self._base_tensors(), **state.own}
                names = self._trained_statistics(state)
                kept += [(tensors[n], tensors[n].clone()) for n in names]
        try:
            yield
        except ValueError as error:
            for tensor, before in kept:
                tensor.copy_(before)
            if kept and "more than 1 value per channel" in str(error):
                raise DataError(
                    "A group of one row is too small for a batch normalisation that the task "
                    "trains: it needs more than one value per channel. Use larger batches, drop "
                    "the last incomplete one, or call model.eval()."
                ) from error
            raise

    def _penalty(self, records: Mapping[str, Records], charge: Mapping[str, float]) -> Tensor:
        total = next(iter(self._base_tensors().values()), torch.empty(0)).new_zeros(())
        by_plan: dict[Sharing, list[str]] = {}
        for name in records:
            by_plan.setdefault(self._state(name).sharing, []).append(name)
        shared = {**self._base_tensors(), **self.shared}
        for plan, names in by_plan.items():
            factor = next((charge[n] for n in names if n in charge), 1.0)
            if factor == 0.0:
                continue
            mine = {n: records[n] for n in names}
            own = {n: self.tasks[n].own for n in names}
            for penalty in plan.penalties:
                total = total + factor * penalty(mine, own, shared)
        return total

    def _dry_run(self, state: TaskState) -> None:
        reference = next(iter(self._base_tensors().values()), torch.empty(0))
        example = pytree.tree_map_only(Tensor, lambda t: t.to(reference.device), self.example)
        args, kwargs = call_arguments((example,), {})
        was_training = self.training
        self.train(False)
        try:
            with torch.no_grad():
                self._run_task(state, args, kwargs, Call())
        finally:
            self.train(was_training)

    def _before_loading(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        # Loading copies into our tensors in place; do not let it reach the user's base.
        if not self._base_is_borrowed:
            return
        for name, tensor in self._base_tensors().items():
            new = state_dict.get(f"{prefix}base.{name}")
            if new is not None and not (new.shape == tensor.shape and torch.equal(new, tensor)):
                tensor.data = tensor.data.clone()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_pools"] = {}  # views and structures are rebuilt, never copied or stored
        return state

    def extra_repr(self) -> str:
        """The plan and the tasks, for ``print(model)``."""
        return f"sharing={self.sharing.method}, tasks={list(self.tasks)}"
