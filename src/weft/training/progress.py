"""What a person sees while training runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .history import Row

MANY = 8
"""Up to so many tasks get a line each."""


class Display:
    """A live bar on a terminal, a line per epoch elsewhere, or nothing.

    Args:
        enabled: whether to show anything.
        epochs: of the run.
        steps: in one epoch.
        console: where to; default standard error, so that standard output stays for results.
    """

    def __init__(
        self, enabled: bool, epochs: int, steps: int, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._epochs = epochs
        self._steps = steps
        self._lines = enabled and not self._console.is_terminal
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._id = self._bar.add_task("training", total=epochs * steps, note="")

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

    def begin(self, epoch: int, phase: str) -> None:
        """An epoch begins."""
        if self._bar is not None:
            done = epoch * self._steps
            self._bar.update(
                self._id, completed=done, description=f"epoch {epoch + 1}/{self._epochs} {phase}"
            )

    def step(self, losses: Mapping[str, float]) -> None:
        """A step is done."""
        if self._bar is not None:
            mean = sum(losses.values()) / max(len(losses), 1)
            self._bar.update(self._id, advance=1, note=f"loss {mean:.3f}")

    def end(self, epoch: int, rows: Mapping[str, Row]) -> None:
        """An epoch is done."""
        if not self._lines and self._bar is None:
            return
        console = self._console if self._bar is None else self._bar.console
        shown = rows if len(rows) <= MANY else {f"{len(rows)} tasks": _summary(rows)}
        for name, row in shown.items():
            line = f"{name}: epoch {epoch + 1}/{self._epochs}  {_describe(row)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _describe(row: Row) -> str:
    parts = [row["phase"], f"loss {row['loss']:.4f}"]
    parts += [f"{name} {value:.4f}" for name, value in list(row["val"].items())[:1]]
    if row["gates"]:
        parts.append(f"open gates {row['open_gates']}/{row['gates']}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def _summary(rows: Mapping[str, Row]) -> Row:
    """One row in the place of very many: means over the tasks, and the gates of all."""
    every = list(rows.values())
    scores: dict[str, list[float]] = {}
    for row in every:
        for name, value in list(row["val"].items())[:1]:
            scores.setdefault(f"mean {name}", []).append(value)
    return {
        "phase": every[0]["phase"],
        "loss": sum(row["loss"] for row in every) / len(every),
        "val": {name: sum(values) / len(values) for name, values in scores.items()},
        "open_gates": sum(row["open_gates"] for row in every),
        "gates": sum(row["gates"] for row in every),
        "seconds": every[0]["seconds"],
    }
