"""What `fit` is asked for, in plain values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from weft.core.options import Options
from weft.errors import ConfigError, close_matches

from .schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """What `fit` was asked for; see there for each."""

    epochs: int
    steps: int | None
    lr: float
    head_lr: float | None
    momentum: float
    weight_decay: float
    schedule: Schedule
    warmup_steps: int
    accumulate: int
    one_at_a_time: bool
    clip: float | None
    keep: Literal["best", "last"]
    patience: int | None
    seed: int
    weights: Mapping[str, float]

    def check(self, tasks: Collection[str]) -> None:
        """Refuse values that cannot work.

        Args:
            tasks: the names of the tasks to fit.

        Raises:
            ConfigError: names the option, what was found and what is expected.
        """
        given = Options("", ConfigError)
        given.whole("epochs", self.epochs, 1)
        given.whole("accumulate", self.accumulate, 1)
        given.whole("warmup_steps", self.warmup_steps, 0)
        given.whole("seed", self.seed, 0)
        given.number("momentum", self.momentum, "[0, 1)")
        given.number("weight_decay", self.weight_decay, "[0, inf)")
        given.word("keep", self.keep, ("best", "last"))
        given.word("schedule", self.schedule, ("cosine", "constant"))
        for name, count in {"steps": self.steps, "patience": self.patience}.items():
            if count is not None:
                given.whole(name, count, 1, "or None")
        positive = {"lr": self.lr, "head_lr": self.head_lr, "clip": self.clip}
        for name, value in positive.items():
            if value is not None:
                given.number(name, value, "(0, inf)")
        for task, weight in self.weights.items():
            if task not in tasks:
                raise ConfigError(
                    f"weights names '{task}', which is not fitted. Fitted: {', '.join(tasks)}."
                    + close_matches(task, tasks)
                )
            given.number(f"weights[{task!r}]", weight, "[0, inf)")

    def updates(self, steps: int) -> int:
        """How many optimiser steps so many batches make."""
        return math.ceil(steps / self.accumulate)

    def plain(self) -> dict[str, Any]:
        """The settings as a dict of plain values."""
        values = {**asdict(self), "weights": {k: float(v) for k, v in self.weights.items()}}
        return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
