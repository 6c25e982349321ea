"""What a person sees of a fleet: what runs, what is done, and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from .attempts import Outcome
from .cells import Cell


@final
class Estimate:
    """The time that a fleet still needs, from the cells that are finished.

    Args:
        cells: what is to be run.
        jobs: how many run at a time.
    """

    def __init__(self, cells: Iterable[Cell], jobs: int) -> None:
        self._left = {cell.name: cell for cell in cells}
        self._jobs = jobs
        self._shares = dict.fromkeys(self._left, 0.0)
        self._seconds: dict[str, list[float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        """A cell of this kind took so long."""
        self._seconds.setdefault(cell.label, []).append(seconds / len(cell.tasks))

    def share(self, cell: Cell, share: float) -> None:
        """So much of a cell is done, 0..1."""
        self._shares[cell.name] = share

    def drop(self, cell: Cell) -> None:
        """A cell has ended."""
        self._left.pop(cell.name, None)

    def seconds(self) -> float | None:
        """Seconds that are left, None while nothing is known or when nothing is left."""
        known = [value for values in self._seconds.values() for value in values]
        if not known or not self._left:
            return None
        total = 0.0
        for cell in self._left.values():
            like = self._seconds.get(cell.label, known)
            total += (1 - self._shares[cell.name]) * len(cell.tasks) * sum(like) / len(like)
        return total / min(self._jobs, len(self._left))


@final
class Display:
    """Live bars on a terminal, a line per cell that ends elsewhere, or nothing.

    Args:
        enabled: whether to show anything.
        cells: what is to be run.
        done: how many cells are finished already.
        estimate: knows the time left.
        console: where to; default standard error, so that standard output stays for results.
    """

    def __init__(
        self,
        enabled: bool,
        cells: list[Cell],
        done: int,
        estimate: Estimate,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._enabled, self._done, self._total = enabled, done, done + len(cells)
        self._estimate = estimate
        self._began: dict[str, float] = {}
        self._lines: dict[str, TaskID] = {}
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
            self._all = self._bar.add_task("cells", total=self._total, completed=done, note="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, cell: Cell, event: int | Outcome | None) -> None:
        """A cell begins (None), has done so many epochs, or has ended.

        Args:
            cell: the cell.
            event: what has happened.
        """
        epochs = cell.epochs
        if event is None:
            self._began[cell.name] = time.monotonic()
            if self._bar is not None:
                self._lines[cell.name] = self._bar.add_task(_name(cell), total=epochs, note="")
        elif isinstance(event, int):
            self._estimate.share(cell, event / epochs)
            if self._bar is not None:
                self._bar.update(self._lines[cell.name], completed=event)
                self._bar.update(self._all, note=self._left())
        else:
            self._ended(cell, event)

    def _ended(self, cell: Cell, outcome: Outcome) -> None:
        seconds = time.monotonic() - self._began.pop(cell.name)
        self._estimate.drop(cell)
        self._done += 1
        if outcome.end == "finished":
            self._estimate.learn(cell, seconds)
        if self._bar is not None:
            self._bar.remove_task(self._lines.pop(cell.name))
            self._bar.update(self._all, completed=self._done, note=self._left())
        if self._enabled:
            said = {
                "finished": f"{seconds:.1f} s",
                "elsewhere": "another process runs it",
                "failed": f"failed: {outcome.reason}",
            }
            line = f"{self._done}/{self._total} {_name(cell)}: {said[outcome.end]}"
            left = self._left()
            console = self._console if self._bar is None else self._bar.console
            console.print(f"{line}  {left}".rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        seconds = self._estimate.seconds()
        return "" if seconds is None else f"about {duration(seconds)} left"


def _name(cell: Cell) -> str:
    who = cell.tasks[0] if len(cell.tasks) == 1 else f"{len(cell.tasks)} tasks"
    return f"{who} {cell.label} seed {cell.seed}"


def duration(seconds: float) -> str:
    """A time as people read it: ``2 h 05 min``, ``3 min``, ``20 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
