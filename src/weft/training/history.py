"""What training leaves behind: a row per task and epoch, kept in memory and as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core.model import MultiTaskModel

from .files import write_whole

Row = dict[str, Any]
"""``{epoch, phase, loss, penalty, lr, seconds, val, open_gates, gates, own_fraction}``.

Losses and penalties are means over the epoch's steps; the penalty is that of all tasks of the step;
the learning rate is that of the epoch's last step, before the factors of groups. A plan's penalties
may add figures, for instance the ``price`` that a byte budget has reached.
"""


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
        """Write one JSON line per task and epoch, in the order in which they were run.

        Args:
            path: the file; replaced as a whole.

        Raises:
            TrainingError: it cannot be written.
        """
        rows = [(row["epoch"], task, row) for task, rows in self.rows.items() for row in rows]
        rows.sort(key=lambda item: item[0])
        lines = [json.dumps(_json({"task": task, **row}), allow_nan=False) for _, task, row in rows]
        write_whole(path, "".join(line + "\n" for line in lines).encode())


def _json(value: Any) -> Any:
    """The value without numbers that JSON does not know; they become null."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Epoch:
    """What a callback receives after each epoch.

    Args:
        model: the model in training, to look at and not to change.
        number: the epoch, counted from 0.
        rows: by task, the epoch's row.
        stop: call it to end training after this epoch.
    """

    model: MultiTaskModel
    number: int
    rows: dict[str, Row]
    stop: Callable[[], None]


Callback = Callable[[Epoch], None]
