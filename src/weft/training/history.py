"""What training leaves behind: a row per task and epoch, kept in memory and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core.model import MultiTaskModel

Row = dict[str, Any]
"""``{epoch, phase, loss, penalty, lr, seconds, val, open_gates, gates, own_fraction}``."""


@dataclass
class History:
    """The course of a training run.

    Args:
        rows: by task, a row per epoch; ``val`` holds the validation metrics, if there are any.
        best: by task, the epoch that was kept (counted from 0).
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, task: str) -> list[Row]:
        return self.rows[task]

    @property
    def epochs(self) -> int:
        """How many epochs were run."""
        return max((len(rows) for rows in self.rows.values()), default=0)

    def write(self, path: Path) -> None:
        """Write one JSON line per task and epoch, in the order in which they were run."""
        rows = [(row["epoch"], task, row) for task, rows in self.rows.items() for row in rows]
        rows.sort(key=lambda item: item[0])
        lines = [json.dumps({"task": task, **row}) for _, task, row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines))


@dataclass(frozen=True)
class Epoch:
    """What a callback receives after each epoch.

    Args:
        model: the model in training.
        number: the epoch, counted from 0.
        rows: by task, the epoch's row.
        stop: call it to end training after this epoch.
    """

    model: MultiTaskModel
    number: int
    rows: dict[str, Row]
    stop: Callable[[], None]


Callback = Callable[[Epoch], None]
