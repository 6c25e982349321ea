"""The server: one resident base, and tasks of a bank that come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.bank import Bank
from weft.core.ledger import Ledger
from weft.core.rows import Arguments, Rows, call_arguments, count_rows
from weft.core.task import Task

from .answers import Answer
from .catalogue import Summary
from .directory import Changes, Directory
from .forwards import every_task, model_of, row_by_row, run
from .halving import halve, relative_error
from .loading import Output, TaskLoader
from .residency import Residency, Resident


@final
class Server:
    """The tasks of a bank on one base in memory, called like a model; for inference only.

    Tasks are loaded at their first use. With ``max_bytes`` the least recently used ones leave when
    others need the room; what a call needs never leaves under it. Safe under threads: a missing
    task is loaded once, and while it loads, calls of tasks in memory go on. Outputs are those of
    ``bank.load(base).eval()``.

    Args:
        bank: where tasks come from.
        base: the base that they were trained on; it is never modified.
        max_bytes: for own tensors and heads in memory, > 0; None for no bound. The base and shared
            states come on top.
        pinned: tasks to load now and keep.
        half: whether own tensors are held in half precision (not heads, and not tensors with
            values outside its range); `half_error` measures what that changes.
        heads: by task, modules for heads of one's own, as for `Bank.load`.
        custom_tasks: by task, the `Task` with a head of one's own, as for `Bank.load`.
        example: one batch for the base, where heads need a dry run.
        output: what heads read of the base's output; a name or index comes back by itself.
        device: where to run; default where the base is.

    Raises:
        BankError: there is no bank, it belongs to another base, or a pinned task cannot be loaded.
        NoRoomError: the pinned tasks do not fit.
    """

    def __init__(
        self,
        bank: Bank,
        base: nn.Module,
        *,
        max_bytes: int | None = None,
        pinned: Sequence[str] = (),
        half: bool = False,
        heads: Mapping[str, nn.Module] | None = None,
        custom_tasks: Mapping[str, Task] | None = None,
        example: Any = None,
        output: Output = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.bank = bank
        self.half = half
        self._loader = TaskLoader(
            bank,
            base,
            heads=heads or {},
            custom_tasks=custom_tasks or {},
            example=example,
            output=output,
            device=device,
        )
        self._residency = Residency(self._load, self._estimate, max_bytes)
        self._refreshing = threading.Lock()
        bank.check_base(base)
        self._tasks = Directory(bank)
        self.pin(*pinned)

    def __repr__(self) -> str:
        return f"Server({self.bank.path}, tasks={len(self._tasks)}, resident={len(self.resident)})"

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    # ---------------------------------------------------------------- looking

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of the bank, in the order in which they were first saved."""
        return self._tasks.names

    @property
    def resident(self) -> tuple[str, ...]:
        """The tasks in memory, the most recently used last."""
        return self._residency.names

    @property
    def resident_bytes(self) -> int:
        """Bytes of own tensors and heads in memory, with those that are being loaded."""
        return self._residency.size

    @property
    def pinned(self) -> frozenset[str]:
        """The tasks that do not leave."""
        return self._residency.pinned

    @property
    def loads(self) -> int:
        """How often a task was loaded."""
        return self._residency.loads

    @property
    def evictions(self) -> int:
        """How often a task left to make room."""
        return self._residency.evictions

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self._loader.device

    def summary(self, task: str) -> Summary:
        """Method, classes, totals of the ledger and metrics of a task, without loading it.

        Raises:
            TaskError: no such task.
            BankError: its document is damaged or gone.
        """
        return self._tasks.summary(self._known(task))

    def ledger(self, task: str) -> Ledger:
        """What a task owns, shares and costs, without loading it.

        Raises:
            TaskError: no such task.
            BankError: its document is damaged or gone.
        """
        return self.bank.ledger(self._known(task))

    # ---------------------------------------------------------------- running

    def __call__(
        self, *inputs: Any, task: Rows, context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The outputs of the tasks' heads, as a call of the model gives them.

        Args:
            inputs: one tensor, tuple or dict of tensors with rows first, or the positional inputs
                of the base.
            task: a name or an index into `task_names`, for all rows or one per row.
            context: handed to adapters.
            kwargs: keyword inputs of the base.

        Returns:
            The head's output for one task. For a task per row: a tensor in row order if all rows'
            outputs have one shape, otherwise a list of them.

        Raises:
            TaskError: an unknown task.
            DataError: the number of names differs from the number of rows.
            NoRoomError: the tasks do not fit into ``max_bytes`` together.
            BankError: a task cannot be loaded.
        """
        batch = call_arguments(inputs, kwargs)
        names = self._tasks.chosen(task, count_rows(*batch))
        with self._leased([names] if isinstance(names, str) else names) as residents:
            if isinstance(names, str):
                return run(model_of(residents), batch, names, context)
            return row_by_row(residents, batch, names, context)

    def predict_all(
        self,
        *inputs: Any,
        tasks: Iterable[str] | None = None,
        context: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Several tasks' outputs on the same input; what they share is computed once.

        Tasks that do not fit into ``max_bytes`` together run one group after the other.

        Args:
            inputs: as for a call.
            tasks: which ones; default all.
            context: handed to adapters.
            kwargs: keyword inputs of the base.

        Returns:
            ``{task: output}``.

        Raises:
            TaskError: an unknown task.
            NoRoomError: a task does not fit into ``max_bytes``.
            BankError: a task cannot be loaded.
        """
        asked = self.task_names if tasks is None else tuple(map(self._known, tasks))
        batch = call_arguments(inputs, kwargs)
        found: dict[str, Any] = {}
        for _, outputs in self._all(asked, batch, context):
            found |= outputs
        return {name: found[name] for name in asked}

    def answers(self, x: Tensor, tasks: Sequence[str]) -> list[Answer]:
        """What each row's task says about it, and what that means.

        As a call with a task per row, except that tasks that do not fit into ``max_bytes``
        together run one group after the other.

        Args:
            x: (rows, ...).
            tasks: (rows,) their names.

        Returns:
            An answer for each row.

        Raises:
            TaskError: an unknown task.
            DataError: the number of names differs from the number of rows.
            NoRoomError: a task does not fit into ``max_bytes``.
            BankError: a task cannot be loaded.
        """
        names = self._tasks.chosen(tasks, len(x))
        found: dict[int, Answer] = {}
        for residents in self._residency.leases(names):
            places = [i for i, name in enumerate(names) if name in residents]
            mine = [names[i] for i in places]
            rows = x if len(mine) == len(names) else x[places]
            with torch.inference_mode():
                outputs = row_by_row(residents, ((rows,), {}), mine, None)
                for place, name, output in zip(places, mine, outputs, strict=True):
                    found[place] = Answer(name, residents[name].state.task, output)
        return [found[i] for i in range(len(names))]

    def all_answers(self, x: Tensor, tasks: Sequence[str]) -> list[list[Answer]]:
        """What every task says about each row, and what that means.

        Args:
            x: (rows, ...).
            tasks: their names.

        Returns:
            For each row an answer of each task.

        Raises:
            TaskError: an unknown task.
            NoRoomError: a task does not fit into ``max_bytes``.
            BankError: a task cannot be loaded.
        """
        asked = tuple(map(self._known, tasks))
        found: list[list[Answer]] = [[] for _ in range(len(x))]
        for residents, outputs in self._all(asked, ((x,), {}), None):
            for name, output in outputs.items():
                meaning = residents[name].state.task
                for i, answers in enumerate(found):
                    row = pytree.tree_map_only(Tensor, itemgetter(i), output)
                    answers.append(Answer(name, meaning, row))
        return found

    def half_error(
        self, task: str, *inputs: Any, context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> float:
        """How far half precision moves a task's output on an input, measured.

        The task is read from the bank for this; what is in memory stays as it is.

        Args:
            task: its name.
            inputs: as for a call.
            context: handed to adapters.
            kwargs: keyword inputs of the base.

        Returns:
            The largest difference to the output in full precision, relative to the largest value
            of that output.

        Raises:
            TaskError: no such task.
            BankError: the task cannot be loaded.
        """
        resident = self._loader.read(self._known(task), half=False)
        model = model_of({task: resident})
        with torch.inference_mode():
            exact = model(*inputs, task=task, context=context, **kwargs)
        halve(resident.state)
        with torch.inference_mode():
            found = model(*inputs, task=task, context=context, **kwargs)
        return relative_error(found, exact)

    # -------------------------------------------------------------- residency

    def preload(self, *tasks: str) -> None:
        """Load tasks, as a call would; they leave like any others.

        Raises:
            TaskError: an unknown task.
            NoRoomError: the tasks do not fit into ``max_bytes`` together.
            BankError: a task cannot be loaded.
        """
        with self._residency.lease(map(self._known, tasks)):
            pass

    def pin(self, *tasks: str) -> None:
        """Load tasks and keep them in memory.

        Raises:
            TaskError: an unknown task.
            NoRoomError: the pinned tasks do not fit into ``max_bytes`` together.
            BankError: a task cannot be loaded.
        """
        self._residency.pin(map(self._known, tasks))

    def unpin(self, *tasks: str) -> None:
        """Let tasks leave like any others.

        Raises:
            TaskError: an unknown task.
        """
        self._residency.unpin(map(self._known, tasks))

    def refresh(self) -> Changes:
        """Look at the bank again: new tasks can be asked for, changed ones load at their next use.

        Tasks that are gone from the bank leave; calls under way end with what they have. Indices
        of tasks behind a removed one change.

        Returns:
            What has changed.

        Raises:
            BankError: there is no bank any more; then all stays as it is.
        """
        with self._refreshing:
            found = self._tasks.look(self._residency.stamps())
            self._residency.unpin(found.removed)
            self._residency.drop([*found.removed, *found.changed])
            self._loader.refresh(self._tasks)
        return found

    # ---------------------------------------------------------------- inside

    def _all(
        self, names: Sequence[str], batch: Arguments, context: Mapping[str, Any] | None
    ) -> Iterator[tuple[dict[str, Resident], dict[str, Any]]]:
        """Tasks on one input, in parts that fit into memory; each with its outputs."""
        for residents in self._residency.leases(names):
            with torch.inference_mode():
                outputs = every_task(residents, batch, context)
            yield residents, outputs

    @contextmanager
    def _leased(self, names: Iterable[str]) -> Iterator[dict[str, Resident]]:
        with self._residency.lease(names) as residents, torch.inference_mode():
            yield residents

    def _known(self, task: str) -> str:
        return self._tasks.known(task)

    def _estimate(self, task: str) -> int:
        summary = self._tasks.summary(task)
        return summary.half_size if self.half else summary.size

    def _load(self, task: str) -> Resident:
        return self._loader.read(task, half=self.half)
