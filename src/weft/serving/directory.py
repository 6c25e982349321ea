"""Which tasks a server has: their names, what their documents say, and what has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from weft.bank import Bank
from weft.core.rows import Rows, chosen_tasks
from weft.errors import BankError, TaskError, close_matches

from .catalogue import Catalogue, Summary


@final
@dataclass(frozen=True)
class Changes:
    """What a bank has that a server did not know.

    Args:
        added: new tasks.
        removed: tasks that are gone.
        changed: tasks in memory that have been saved again.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@final
class Directory:
    """The tasks of a bank as they were when it was last looked at.

    Args:
        bank: the bank.

    Raises:
        BankError: there is none.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._catalogue = Catalogue(bank)
        self._names = self._found()

    def __contains__(self, task: object) -> bool:
        return task in self._names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in the order in which they were first saved."""
        return tuple(self._names)

    def summary(self, task: str) -> Summary:
        """A task in brief.

        Raises:
            BankError: its document is damaged or gone.
        """
        return self._catalogue[task]

    def known(self, task: str) -> str:
        """The task's name.

        Raises:
            TaskError: no such task.
        """
        names = self._names
        if task in names:
            return task
        raise TaskError(
            f"There is no task '{task}' among the {len(names)} of {self._bank.path}."
            + close_matches(str(task), names)
        )

    def chosen(self, task: Rows, rows: int) -> str | list[str]:
        """One name for all rows, or a name per row.

        Raises:
            TaskError: no such task.
            DataError: the number of tasks differs from the number of rows.
        """
        for name in [task] if isinstance(task, str) else task if isinstance(task, Sequence) else ():
            if isinstance(name, str):
                self.known(name)
        return task if isinstance(task, str) else chosen_tasks(task, self.names, rows)

    def look(self, stamps: Mapping[str, tuple[int, ...]]) -> Changes:
        """Look at the bank again.

        Args:
            stamps: by task in memory, the stamp of the bundle that it was loaded from.

        Raises:
            BankError: there is no bank any more; what is known stays.
        """
        before, names = self._names, self._found()
        removed = tuple(name for name in before if name not in names)
        changed = (n for n, stamp in stamps.items() if n in names and self._moved(n, stamp))
        found = Changes(tuple(n for n in names if n not in before), removed, tuple(changed))
        self._names = names
        for name in removed:
            self._catalogue.forget(name)
        return found

    def _found(self) -> dict[str, None]:
        names = dict.fromkeys(self._bank.tasks())
        self._bank.base()  # a folder that is no bank any more has no tasks, either
        return names

    def _moved(self, task: str, stamp: tuple[int, ...]) -> bool:
        try:
            return self._bank.stamp(task) != stamp
        except BankError:  # its bundle is being replaced, or is damaged: look at the next use
            return True
