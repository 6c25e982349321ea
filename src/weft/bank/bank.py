"""The bank: a folder with one base's tasks, each a bundle of its own."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from weft.core.ledger import Ledger
from weft.core.model import MultiTaskModel, check_model
from weft.core.sharing import Sharing
from weft.core.task import Task
from weft.errors import BankError, close_matches

from .bundles import decode_ledger, read_entry, timestamp, write_bundle
from .checking import well_formed
from .documents import plain
from .fingerprint import MarkCache, base_entry, difference, without_values
from .loading import Loader, Output
from .shared import SharedCache, shared_state
from .store import Store
from .verifying import Problem, problems


class Bank:
    """Tasks on disk: one base, and for every task what it owns, its head and its plan.

    Nothing in it is pickled. Saving is atomic for each task: a killed save leaves the task's old
    bundle or its new one. Several processes may save into one bank at the same time.

    Args:
        path: the folder; `save` makes it.
        create: whether there need not be a bank yet.

    Raises:
        BankError: there is no bank, and there must be one.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self._store = Store(self.path)
        self._marks = MarkCache()
        self._shared = SharedCache()
        self._loader = Loader(self._store, self._marks, self._shared)
        if not create:
            self.base()

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r})"

    # ---------------------------------------------------------------- looking

    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order in which they were first saved.

        Raises:
            BankError: the folder is something else than a bank.
        """
        with self._store.reading():
            added = {name: self._store.added(name) or "~" for name in self._names()}
        return tuple(sorted(added, key=lambda name: (added[name], name)))

    def _names(self) -> list[str]:
        if self._store.is_new:
            return []
        self._store.bank()
        return self._store.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks())

    def __len__(self) -> int:
        with self._store.reading():
            return len(self._names())

    def __contains__(self, task: object) -> bool:
        with self._store.reading():
            return task in self._names()

    def info(self, task: str) -> dict[str, Any]:
        """Everything about a task that is not a tensor: the content of its ``bundle.json``.

        Args:
            task: its name.

        Returns:
            ``plan`` (method, options, patches), ``ledger`` (totals, rows), ``facts`` (metrics,
            history), ``scores``, ``definition`` (task, classes, head), ``own`` and ``head``
            (types and shapes), ``files`` (bytes, hashes), ``base``, ``shared``, ``versions``,
            ``added``, ``saved``.

        Raises:
            BankError: there is no such task, or its bundle is damaged.
        """
        with self._store.reading():
            return read_entry(self._store.place(task), task)

    def stamp(self, task: str) -> tuple[int, ...]:
        """What changes whenever a task is saved again, read without opening its bundle.

        Raises:
            BankError: there is no such task.
        """
        with self._store.reading():
            return self._store.stamp(task)

    def ledger(self, task: str) -> Ledger:
        """The task's ledger as it was saved.

        Raises:
            BankError: there is no such task, or its bundle is damaged.
        """
        with well_formed(task):
            return decode_ledger(self.info(task))

    def base(self) -> dict[str, Any]:
        """What the bank knows about its base: class, fingerprint, parameters, bytes, tensors.

        Raises:
            BankError: the folder is no bank.
        """
        with self._store.reading():
            return copy.deepcopy(self._store.base())

    def check_base(self, base: nn.Module) -> None:
        """Refuse a base that the tasks here do not stand on; cheaper than loading one of them.

        Args:
            base: the base; its tensors are hashed.

        Raises:
            BankError: says what differs; or the folder is no bank.
        """
        with self._store.reading():
            known = self._store.marks()
        wrong = difference(known, self._marks.marks(base, anew=True))
        if wrong:
            raise BankError(
                f"The tasks of {self.path} stand on another base than this one: {wrong}. "
                "Hand in the base that they were trained on."
            )

    def verify(self, base: nn.Module | None = None) -> list[Problem]:
        """Read everything and compare it with what was saved.

        Args:
            base: compared with the bank's base, where given.

        Returns:
            What is wrong, with the task it concerns; empty if all is well.
        """
        marks = None if base is None else self._marks.marks(base, anew=True)
        return problems(self._store, marks)

    # ----------------------------------------------------------------- saving

    def save(self, model: MultiTaskModel, *tasks: str) -> None:
        """Store tasks with their gates final; the model stays as it is.

        Args:
            model: the model.
            tasks: which ones; all if none are named. Bundles of the same name are replaced.

        Raises:
            BankError: the bank belongs to another base, cannot be written to, or a task holds
                something that has no form on disk. What was there before is unharmed.
            TaskError: the model has no such task, or its head is not built yet.
            ConfigError: this is no model.
        """
        check_model("bank.save", model)
        names = tasks or model.task_names
        if not names:
            raise BankError("The model has no tasks to save. Add one: model.add_task(name, task).")
        for name in names:
            model.head(name)
            plain(model.tasks[name].facts, f"facts of '{name}'")
        marks = without_values(self._marks.marks(model.base), model.sharing.train_shared)
        base = base_entry(model.base, marks)
        with self._store.reading():
            self._store.check_base(marks)
        shared = shared_state(model)
        if shared is not None:
            self._shared.remember(model, shared.hash)
        for i, name in enumerate(names):
            with self._store.preparing(f"save '{name}'") as staged:
                with self._store.reading():
                    added = self._added(name) or timestamp(time.time_ns() + i)
                place = self._store.staged_bundle(staged)
                write_bundle(place, model, name, base["fingerprint"], shared, added=added)
                self._store.publish(staged, name, base, shared)

    def _added(self, task: str) -> str:
        """When a task was first saved, or "" if that cannot be read."""
        try:
            return str(read_entry(self._store.place(task), task)["added"])
        except (BankError, KeyError):
            return ""

    def remove(self, task: str) -> None:
        """Drop a task's bundle, and the shared states that no bundle needs any more.

        Raises:
            BankError: there is no such task, or the folder cannot be written to.
        """
        with self._store.reading():
            self._store.place(task)
        self._store.remove(task)
        self.prune()

    def prune(self) -> list[str]:
        """Drop the shared states that no bundle needs any more.

        Returns:
            Their hashes. Nothing is dropped while a bundle cannot be read.
        """
        self.base()
        return self._store.prune()

    # ---------------------------------------------------------------- loading

    def load(
        self,
        base: nn.Module,
        *tasks: str,
        heads: Mapping[str, nn.Module] | None = None,
        custom_tasks: Mapping[str, Task] | None = None,
        sharing: Sharing | Sequence[Sharing] | None = None,
        example: Any = None,
        output: Output = None,
        allow_other_base: bool = False,
        verify: bool = True,
    ) -> MultiTaskModel:
        """A model with the stored tasks; outputs are those of the saved model, bit for bit.

        Args:
            base: the base that the tasks were trained on.
            tasks: which ones, in this order; all, in the order of `tasks`, if none are named.
            heads: by task, modules for heads of one's own; they are copied and filled.
            custom_tasks: by task, the `Task` with a loss and metric (and head) of one's own.
            sharing: the plan to train on with, or the model's and those of tasks that have others.
                Plans come back from the bank except for their code (charges, functions of phases):
                without this, such plans refuse to train.
            example: as for `MultiTaskModel`.
            output: as for `MultiTaskModel`; a name or index comes back by itself.
            allow_other_base: accept a base whose values, types or names differ, as long as the
                tasks' tensors fit.
            verify: compare the hashes of all files with what was saved.

        Returns:
            The model, in training mode as any new one.

        Raises:
            BankError: a file is damaged or foreign, the base is another one, the tasks depend on
                different shared states, or a part of one's own was not handed in.
        """
        with self._store.reading():
            self._store.bank()
            names = list(dict.fromkeys(tasks)) or self._store.names()
        if not names:
            raise BankError(f"{self.path} holds no tasks. Save some: bank.save(model).")
        heads, custom = heads or {}, custom_tasks or {}
        for given in [*heads, *custom]:
            if given not in names:
                raise BankError(
                    f"A head or task was handed in for '{given}', which is not loaded."
                    + close_matches(given, names)
                )
        plans = [sharing] if isinstance(sharing, Sharing) else list(sharing or ())
        if sharing is not None and not plans:
            raise BankError("sharing is a plan or some of them, found an empty list.")
        bundles = {name: self._loader.read(name, verify=verify) for name in names}
        if not tasks:
            with well_formed(names[0]):
                bundles = dict(sorted(bundles.items(), key=lambda item: item[1].entry["added"]))
        model = self._loader.model(
            base,
            bundles,
            sharing=plans[0] if plans else None,
            example=example,
            output=output,
            marks=None if allow_other_base else self._marks.marks(base, anew=True),
            verify=verify,
        )
        for name, bundle in bundles.items():
            self._loader.add(
                model,
                bundle,
                heads.get(name),
                custom.get(name),
                plans=plans,
                fits=not allow_other_base,
            )
        return model

    def add_to(
        self,
        model: MultiTaskModel,
        task: str,
        *,
        head: nn.Module | None = None,
        custom_task: Task | None = None,
        allow_other_base: bool = False,
        verify: bool = True,
    ) -> None:
        """Add one stored task to a model that is there already, for instance in a server.

        Args:
            model: a model on the same base (and, where the task depends on one, with the same
                shared state).
            task: the task's name.
            head: a module for a head of one's own.
            custom_task: the `Task` with a loss and metric of one's own.
            allow_other_base: as for `load`.
            verify: as for `load`.

        Raises:
            BankError: as for `load`.
            TaskError: the model has a task of this name.
        """
        bundle = self._loader.read(task, verify=verify)
        with well_formed(task):
            self._loader.check(model, bundle, base=not allow_other_base)
        self._loader.add(model, bundle, head, custom_task, plans=(), fits=not allow_other_base)
