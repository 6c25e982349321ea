"""What `fit` is asked for, in plain values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from weft.core.numbers import is_number, is_whole
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
        _whole("epochs", self.epochs, 1)
        _whole("accumulate", self.accumulate, 1)
        _whole("warmup_steps", self.warmup_steps, 0)
        _whole("seed", self.seed, 0)
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        if self.patience is not None:
            _whole("patience", self.patience, 1)
        positive = {"lr": self.lr, "head_lr": self.head_lr, "clip": self.clip}
        for name, value in positive.items():
            if value is not None and not (is_number(value) and 0.0 < value < math.inf):
                raise ConfigError(f"{name} is a positive number, found {value!r}.")
        if not (is_number(self.momentum) and 0.0 <= self.momentum < 1.0):
            raise ConfigError(f"momentum is a number in [0, 1), found {self.momentum!r}.")
        if not (is_number(self.weight_decay) and 0.0 <= self.weight_decay < math.inf):
            raise ConfigError(f"weight_decay is a number >= 0, found {self.weight_decay!r}.")
        if self.keep not in ("best", "last"):
            raise ConfigError(f"keep is 'best' or 'last', found {self.keep!r}.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule is 'cosine' or 'constant', found {self.schedule!r}.")
        for task, weight in self.weights.items():
            if task not in tasks:
                raise ConfigError(
                    f"weights names '{task}', which is not fitted. Fitted: {', '.join(tasks)}."
                    + close_matches(task, tasks)
                )
            if not (is_number(weight) and 0.0 <= weight < math.inf):
                raise ConfigError(f"weights[{task!r}] is a number >= 0, found {weight!r}.")

    def updates(self, steps: int) -> int:
        """How many optimiser steps so many batches make."""
        return math.ceil(steps / self.accumulate)

    def plain(self) -> dict[str, Any]:
        """The settings as a dict of plain values."""
        values = {**asdict(self), "weights": {k: float(v) for k, v in self.weights.items()}}
        return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


def _whole(name: str, value: object, least: int) -> None:
    if not is_whole(value, least):
        raise ConfigError(f"{name} is a whole number of at least {least}, found {value!r}.")
