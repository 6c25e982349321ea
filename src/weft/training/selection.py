"""Which epoch is kept, and when there is no use in going on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .checkpoint import Parts, part_of, tasks_of


class Selection:
    """The best epoch so far, with the state that it left.

    Args:
        tasks: those that are validated.
        joint: whether tasks share what they train and so stand and fall together, by the mean of
            their scores; else each task keeps an epoch of its own.
        patience: epochs without a better score after which to stop, or None.
    """

    def __init__(self, tasks: tuple[str, ...], *, joint: bool, patience: int | None) -> None:
        self.epochs: dict[str, int] = {}
        self.kept: Parts = {}
        self._tasks = tasks
        self._joint = joint
        self._patience = patience
        self._scores: dict[str, float] = {}
        self._improved: dict[str, int] = {}

    def consider(self, epoch: int, scores: Mapping[str, float], state: Parts) -> None:
        """Keep an epoch where it is the best so far; a later one wins a tie.

        Args:
            epoch: its number.
            scores: larger is better and NaN is worst, by task, of the tasks whose phase may be
                kept.
            state: what the epoch left.
        """
        values = {t: -math.inf if math.isnan(s) else s for t, s in scores.items()}
        if self._joint:
            if not self._tasks or len(values) < len(self._tasks):
                return
            mean = sum(values.values()) / len(values)
            values = dict.fromkeys(tasks_of(state), mean)
        for task, value in values.items():
            best = self._scores.get(task, -math.inf)
            if value > best or task not in self._improved:
                self._improved[task] = epoch
            if value >= best:
                self._scores[task] = value
                self.epochs[task] = epoch
                self.kept.update(state if self._joint else {part_of(task): state[part_of(task)]})

    def hopeless(self, epoch: int) -> bool:
        """Whether no task has had a better score for too long."""
        if self._patience is None:
            return False
        return all(
            task in self._improved and epoch - self._improved[task] >= self._patience
            for task in self._tasks
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "epochs": self.epochs,
            "scores": self._scores,
            "improved": self._improved,
            "kept": self.kept,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.epochs, self._scores, self.kept = state["epochs"], state["scores"], state["kept"]
        self._improved = state["improved"]
