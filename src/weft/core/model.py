"""The model: one base, the shared tensors of its plan, and what each task owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import ConfigError, DataError, PlanError, TaskError

from .adapter import Records
from .checks import adapter_tensors, check_plan
from .folding import fold
from .ledger import Ledger, gate_scores, hardened, make_ledger
from .mixed_rows import MixedRows
from .mixed_view import MixedView, mixed_view
from .one_input import OneInput
from .rows import (
    Answer,
    Arguments,
    Output,
    Rows,
    assemble,
    call_arguments,
    chosen_tasks,
    count_rows,
    known_task,
    places,
    select_rows,
)
from .running import Runner
from .sharing import Sharing, charges
from .sites import canonical_names
from .state import TaskState, TaskTable, TensorTable, private_copy, restore_ties, same_values
from .task import Task, check_task, check_task_name
from .view import View


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
        self, base: nn.Module, sharing: Sharing, *, example: Any = None, output: Output = None
    ) -> None:
        super().__init__()
        check_plan(base, sharing)
        self.sharing = sharing
        self.base = private_copy(base, sharing.train_shared)
        self.shared = TensorTable()
        self.tasks = TaskTable()
        self.output = output
        self.example = example
        for key, created in sharing.created.items():
            value = created.value.detach().clone()
            self.shared[key] = nn.Parameter(value) if created.trains else value
        self.shared.update(adapter_tensors(self.base, sharing)[1])
        self._names = canonical_names(self.base)
        self._runner = Runner(self.base, self.shared, output)
        self._one_input = OneInput(self._runner)
        self._mixed_rows = MixedRows(self._runner)
        self.register_load_state_dict_post_hook(_restore_ties)  # type: ignore[no-untyped-call]

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
            TaskError: the name is taken or cannot be one, or this is no task.
            PlanError: the plan does not fit the base, would create or train shared tensors, or
                needs some that the model does not have.
        """
        check_task_name(name, self.tasks)
        check_task(task)
        plan = self.sharing if sharing is None else sharing
        if plan is not self.sharing:
            check_plan(self.base, plan, self.sharing.train_shared)
        adapters, shared_by_adapters = adapter_tensors(self.base, plan)
        if plan is not self.sharing and (not plan.only_owns or shared_by_adapters):
            raise PlanError(
                f"The plan '{plan.method}' creates or trains shared tensors, which only the "
                "model's own plan may: give it to MultiTaskModel(base, sharing)."
            )
        base = self._runner.base_tensors()
        own: dict[str, Tensor] = {}
        for tensor_name, patch in plan.patches.items():
            for key, value in patch.init(tensor_name, base[tensor_name]).items():
                own.setdefault(key, value)
        state = TaskState(task, plan, plan.patches, {**own, **adapters})
        self._check_needs(state)
        self.install(name, state)

    def install(self, name: str, state: TaskState) -> None:
        """Add a task whose tensors exist already, for instance one loaded from a bank.

        Args:
            name: its name, usable as a folder's name.
            state: what the model holds for it from now on.

        Raises:
            TaskError: the name is taken or cannot be one.
        """
        check_task_name(name, self.tasks)
        state.to(self._runner.reference().device)
        state.train(self.training)
        if self.example is not None and not state.head_is_built:
            self._runner.dry_run(state, self.example)
        self.tasks.add(name, state)

    def remove_task(self, name: str) -> None:
        """Drop a task with all that it owns.

        Raises:
            TaskError: no such task.
        """
        self.tasks.remove(known_task(name, self.task_names))
        self._runner.sweep()
        self._one_input.forget()
        self._mixed_rows.forget()

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
            task: a name or an index into `task_names`, for all rows or one per row.
            context: handed to adapters (labels, a prompt).
            kwargs: keyword inputs of the base.

        Returns:
            The head's output for one task. For a task per row: a tensor in row order if all rows'
            outputs have one shape, otherwise a list of them.

        Raises:
            TaskError: an unknown task.
            DataError: the number of names differs from the number of rows, or ``context`` is no
                mapping.
        """
        batch = call_arguments(inputs, kwargs)
        rows = count_rows(*batch)
        names = task if isinstance(task, str) else chosen_tasks(task, self.task_names, rows)
        if isinstance(names, str):
            return self._run({names: batch}, context)[0][names]
        found = places(names)
        states = {name: self._state(name) for name in found}
        if torch.compiler.is_compiling():
            parts = {name: select_rows(batch, index, rows) for name, index in found.items()}
            outputs = self._run(parts, context)[0]
            return assemble([Answer((name,), found[name], outputs[name]) for name in found])
        given = self._checked(context)
        answers = self._mixed_rows.run(states, found, batch, rows, given, training=self.training)
        return assemble(answers)

    def predict_all(
        self, *inputs: Any, context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Every task's output on the same input.

        In eval mode without gradients (``torch.no_grad()``) what tasks share is computed once: all
        that comes before the first tensor in which they differ, on every path through the network.
        Own tensors of equal values do not differ.

        Args:
            inputs: as for a call of the model.
            context: handed to adapters.
            kwargs: keyword inputs of the base.

        Returns:
            ``{task: output}``.
        """
        batch = call_arguments(inputs, kwargs)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(dict.fromkeys(self.tasks, batch), context)[0]
        states = {name: self.tasks[name] for name in self.task_names}
        return self._one_input.run(states, batch, self._checked(context))

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
            charge: by task, a factor on its plan's penalties; a task without one follows another
                task with the same penalties. Default: 1.

        Returns:
            Outputs, records and the penalty, to be differentiated together.

        Raises:
            TaskError: an unknown task.
            DataError: a group of one row meets a batch normalisation that trains.
        """
        outputs, records = self._run(
            {name: call_arguments((x,), {}) for name, x in batches.items()}, context
        )
        return Step(outputs, records, self._penalty(records, charge or {}))

    def penalty(self, task: str) -> Tensor:
        """The charge of the task's plan for this task, a scalar to add to the loss.

        Raises:
            PlanError: the plan charges for what adapters record in a forward; use `step`.
        """
        return self.charges({task: 1.0})

    def charges(self, charge: Mapping[str, float]) -> Tensor:
        """What a step of these tasks is charged, a scalar to add to the sum of their losses.

        Args:
            charge: by task, a factor on its plan's penalties.

        Raises:
            PlanError: a plan charges for what adapters record in a forward; use `step`.
        """
        for plan in (self._state(task).sharing for task in charge):
            if any(penalty.needs_records for penalty in plan.penalties):
                raise PlanError(
                    f"'{plan.method}' charges for what a forward records. Use model.step"
                    "({task: batch}), which computes outputs and penalty together."
                )
        return self._penalty({task: {} for task in charge}, charge)

    def view(self, task: str) -> View:
        """The structure bound to one task's tensors: ``view(x)`` is its backbone output.

        In eval mode a view holds constants, of one kind for all tasks, so that tasks share a
        compiled graph; bind ``model.tensors(task)`` to differentiate with respect to them. In
        training mode it holds those, composed once: bind them again after a backward.

        Raises:
            TaskError: no such task.
        """
        return self._runner.view(self._state(task), training=self.training)

    def mixed_view(self, tasks: Sequence[str] | None = None, *, example: Any = None) -> MixedView:
        """Several tasks as one module, ``view(x, task=indices)``, with one graph for all mixes.

        It can be compiled and exported. In eval mode, for tasks that differ in normalisation,
        scales, biases, low rank and heads of one form; others run through ``model(x, task=[...])``.

        Args:
            tasks: their names; ``task`` counts them from 0. Default: all.
            example: inputs of the base, one row suffices; default: the model's example.

        Raises:
            TaskError: no such task.
            PlanError: the graph would depend on the mix, the model is in training mode, or there
                is no example.
        """
        example = self.example if example is None else example
        if self.training or example is None:
            raise PlanError(
                "A view of several tasks needs the model in eval mode, model.eval(), and an "
                "example of the base's inputs: mixed_view(tasks, example=x)."
            )
        names = tuple(self.task_names if tasks is None else tasks)
        states = {name: self._state(name) for name in names}
        if not states or len(states) < len(names):
            raise PlanError(f"A view needs different tasks, found {list(names)}.")
        return mixed_view(self._runner, self._mixed_rows.mixing, states, example)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """Every tensor that runs for the task, by name: the whole truth.

        Returns:
            ``{name: tensor}``, differentiable in grad mode, otherwise constants.

        Raises:
            TaskError: no such task.
        """
        tensors = self._runner.compose(self._state(task))
        if torch.is_grad_enabled():
            return tensors
        return {name: tensor.detach() for name, tensor in tensors.items()}

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
        return _trainable(self._state(task).own.to_dict())

    def shared_trainable(self) -> dict[str, nn.Parameter]:
        """The shared tensors that the model's plan trains, by base name or created key."""
        return _trainable({**self._runner.base_tensors(), **self.shared.to_dict()})

    def plan(self, task: str) -> Sharing:
        """The plan that the task was made by."""
        return self._state(task).sharing

    def is_hardened(self, task: str) -> bool:
        """Whether the task had gates and they are final."""
        return bool(self._state(task).scores)

    # ----------------------------------------------------- storing and leaving

    def harden(self, task: str) -> None:
        """Make the task's gates final: a closed layer is shared again and stores nothing.

        Outputs do not change. `fit` does this at its end.
        """
        state = self._state(task)
        own, shared = state.own.to_dict(), self.shared.to_dict()
        state.scores.update(gate_scores(state.patches, own))
        base = self._runner.base_tensors()
        state.patches, own = hardened(base, state.patches, own, shared)
        state.own = TensorTable(own)
        self._one_input.forget()

    def ledger(self, task: str) -> Ledger:
        """What the task owns, shares and costs, as it would be stored now."""
        state = self._state(task)
        own, shared = state.own.to_dict(), self.shared.to_dict()
        trained = (p for n, p in self.base.named_parameters() if n in self.sharing.train_shared)
        count = sum(p.numel() for p in (*trained, *self.shared.parameters()))
        return make_ledger(
            task, self.base, state.patches, own, state.scores, state.head, shared, count
        )

    def fold(self, task: str) -> nn.Module:
        """A plain module of the base's class with the task baked in, without its head.

        With adapters to fold, it is run once on the model's example, if there is one, beside what
        it replaces.

        Raises:
            PlanError: an adapter of the plan has no plain form, or the base does more with its
                module than to call it, so that the plain form computes something else.
        """
        state = self._state(task)
        with torch.no_grad():
            tensors = self._runner.compose(state)
        plain = fold(self.base, tensors, state.sharing)
        if state.sharing.adapters and self.example is not None:
            self._runner.check_plain(state, plain, self.example)
        return plain.train(self.training)

    # ---------------------------------------------------------------- inside

    def _check_needs(self, state: TaskState) -> None:
        """Refuse a task whose plan reads shared tensors that are not there, or are others."""
        shared = self.shared.to_dict()
        for tensor_name, patch in state.patches.items():
            patch.check_shared(tensor_name, shared)
        for penalty in state.sharing.penalties:
            penalty.check_shared(state.own.to_dict(), shared)

    def _state(self, task: str) -> TaskState:
        name = task if task in self.tasks else known_task(task, self.task_names)
        return self.tasks[name]

    def _run(
        self, parts: Mapping[str, Arguments], context: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Records]]:
        states = {name: self._state(name) for name in parts}
        return self._runner.run(states, parts, self._checked(context), training=self.training)

    @staticmethod
    def _checked(context: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if context is not None and not isinstance(context, Mapping):
            raise DataError(
                f"context= is a mapping for adapters, found {type(context).__name__}. A base with "
                "an input of that name gets it in a dict: model({'x': x, 'context': c}, task=...)."
            )
        return context or {}

    def _penalty(self, records: Mapping[str, Records], charge: Mapping[str, float]) -> Tensor:
        plans = {name: self._state(name).sharing for name in records}
        own = {name: self.tasks[name].own.to_dict() for name in records}
        shared = {**self._runner.base_tensors(), **self.shared.to_dict()}
        total = self._runner.reference().new_zeros(())
        return charges(plans, records, own, shared, charge, total)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # Loading copies into our tensors in place; it must not reach the user's base.
        for name, tensor in self._runner.base_tensors().items():
            new = state_dict.get(f"{prefix}base.{name}")
            if new is not None and not same_values(new, tensor):
                tensor.data = tensor.data.clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in (
            "_runner",
            "_one_input",
            "_mixed_rows",
        ):  # structures are made anew, never copied or stored
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._runner = Runner(self.base, self.shared, self.output)
        self._one_input = OneInput(self._runner)
        self._mixed_rows = MixedRows(self._runner)

    def extra_repr(self) -> str:
        """The plan and the tasks, for ``print(model)``."""
        return f"sharing={self.sharing.method}, tasks={list(self.tasks)}"


def check_model(function: str, model: object) -> None:
    """Refuse what is no model, for instance a plain module.

    Raises:
        ConfigError: says what was found.
    """
    # What torch.compile wraps passes calls and attributes on.
    inner = model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, MultiTaskModel):
        raise ConfigError(
            f"{function} takes a weft.MultiTaskModel, found {type(model).__name__}. Make one of a "
            "base and a plan: weft.MultiTaskModel(base, sharing)."
        )


def _restore_ties(model: MultiTaskModel, _: Any) -> None:
    restore_ties(model.base, model._names)


def _trainable(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {k: p for k, p in tensors.items() if isinstance(p, nn.Parameter) and p.requires_grad}
