"""Phases: what trains in an epoch, on which data, and what happens between."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase, Turn
from weft.errors import DataWarning, TrainingError

from .batches import Loader, split_batch, to_device
from .evaluation import device_of
from .loaders import share_of_process, slice_loader
from .processes import Processes
from .schedule import divide, phase_of_each_epoch
from .settings import Settings


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of an epoch in which every task has one turn.

    Args:
        steps: how many.
        turns: by task.
    """

    steps: int
    turns: Mapping[str, Turn]


@final
class Prepared:
    """Training batches as phases are prepared from them: ``(x, y)`` on a device.

    Args:
        loader: the batches.
        task: the task's name.
        device: where to.
    """

    def __init__(self, loader: Loader, task: str, device: torch.device) -> None:
        self._loader = loader
        self._task = task
        self._device = device

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self._loader:
            yield to_device(split_batch(batch, self._task), self._device)


class Phases:
    """The phases of the tasks of one run.

    Args:
        model: the model; all heads are built.
        train: by task, training batches.
        steps: batches in an epoch.
        settings: what was asked for.
        processes: that train together.

    Raises:
        TrainingError: too few epochs for the phases of a plan, or too few steps for its turns.
        DataError: data that a phase cannot cut, or that processes cannot divide.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        train: Mapping[str, Loader],
        steps: int,
        settings: Settings,
        processes: Processes,
    ) -> None:
        self._model = model
        self._train = train
        self._seed = settings.seed
        self._processes = processes
        self._course: dict[str, list[Phase]] = {}
        for task in train:
            plan = model.plan(task)
            # Final gates have nothing left to choose: training goes on as one phase.
            phases = (Phase("train"),) if model.is_hardened(task) else plan.phases
            self._course[task] = phase_of_each_epoch(phases, settings.epochs, plan.method)
        self._stretches = [self._divided(epoch, steps) for epoch in range(settings.epochs)]
        self._updates = [
            sum(settings.updates(stretch.steps) for stretch in epoch) for epoch in self._stretches
        ]
        self._warn_of_what_is_never_due()
        self._own: dict[str, dict[str, nn.Parameter]] = {t: model.trainable(t) for t in train}
        self._heads: dict[str, list[nn.Parameter]] = {}
        for task in train:
            head = model.head(task)
            parameters = [] if head is None else head.parameters()
            self._heads[task] = [p for p in parameters if p.requires_grad]
        self.shared = model.shared_trainable()
        self._parts: dict[tuple[str, tuple[float, float]], Loader] = {}
        self._shares: dict[tuple[str, tuple[float, float]], Loader] = {}
        for epoch in self._stretches:
            for stretch in epoch:
                self.loaders(stretch)  # data that cannot be cut is refused before any work

    def _warn_of_what_is_never_due(self) -> None:
        seen: set[int] = set()
        for task, course in self._course.items():
            for phase in course:
                if phase.every is None or id(phase) in seen:
                    continue
                seen.add(id(phase))
                _, whole = self._steps_of(phase, task, self._start(task, phase), 0)
                if whole < phase.every:
                    warnings.warn(
                        f"Phase '{phase.name}' of '{task}' looks at what it trained every "
                        f"{phase.every} steps and has {whole}, so it changes nothing. Train "
                        "longer, or give the plan a smaller every=.",
                        DataWarning,
                        stacklevel=2,
                    )

    # ------------------------------------------------------------------ the course

    def of(self, epoch: int) -> dict[str, Phase]:
        """By task, the phase of an epoch."""
        return {task: course[epoch] for task, course in self._course.items()}

    def stretches(self, epoch: int) -> list[Stretch]:
        """The parts of an epoch, in order."""
        return self._stretches[epoch]

    @property
    def restarts(self) -> bool:
        """Whether some phase starts again from the beginning."""
        return any(phase.restart for course in self._course.values() for phase in course)

    def updates_between_restarts(self, task: str) -> tuple[int, ...]:
        """Optimiser steps of the parts of a task's run, each with a schedule of its own."""
        found, course = [0], self._course[task]
        for epoch, updates in enumerate(self._updates):
            if epoch and course[epoch].restart and course[epoch] is not course[epoch - 1]:
                found.append(0)
            found[-1] += updates
        return tuple(found)

    def beginning(self, epoch: int) -> list[tuple[Phase, list[str]]]:
        """The phases whose first epoch this is, with the tasks that are in them."""
        phases = _tasks_of_each(self.of(epoch))
        return [(phase, t) for phase, t in phases if self._start(t[0], phase) == epoch]

    def _divided(self, epoch: int, steps: int) -> list[Stretch]:
        ends: dict[str, list[int]] = {}
        for task, phase in self.of(epoch).items():
            if steps < len(phase.parts):
                raise TrainingError(
                    f"Phase '{phase.name}' divides every epoch into {len(phase.parts)} turns, "
                    f"which {steps} steps are too few for. Use smaller batches or more data."
                )
            lengths = divide(steps, [turn.data[1] - turn.data[0] for turn in phase.parts])
            ends[task] = list(accumulate(lengths))
        bounds = sorted({0, *(end for task in ends for end in ends[task])})
        return [
            Stretch(
                after - before,
                {t: p.parts[bisect_right(ends[t], before)] for t, p in self.of(epoch).items()},
            )
            for before, after in pairwise(bounds)
        ]

    def _start(self, task: str, phase: Phase) -> int:
        return next(epoch for epoch, p in enumerate(self._course[task]) if p is phase)

    # ------------------------------------------------------------------- one epoch

    def enter(self, epoch: int) -> None:
        """Begin an epoch: prepare phases that begin, and let all follow their schedules.

        A phase is prepared in eval mode, and on the whole data also where processes divide it.
        """
        self.begin(self._stretches[epoch][0])
        self._model.eval()
        for phase, tasks in self.beginning(epoch):
            self._prepare(phase, tasks)
        for phase, tasks in _tasks_of_each(self.of(epoch)):
            if phase.each_epoch is not None:
                course, start = self._course[tasks[0]], self._start(tasks[0], phase)
                length = sum(p is phase for p in course)
                with torch.no_grad():
                    phase.each_epoch(self._model, tuple(tasks), epoch - start, length)

    def conclude(self, epochs: int) -> list[str]:
        """Prepare what has to be prepared also in a run that stopped early.

        Args:
            epochs: how many the run had.

        Returns:
            The tasks that this changed.
        """
        changed = []
        self._model.eval()
        for epoch in range(epochs, len(self._stretches)):
            for phase, tasks in self.beginning(epoch):
                if phase.required:
                    self.begin(self._stretches[epoch][0])
                    self._prepare(phase, tasks)
                    changed += tasks
        return changed

    def _prepare(self, phase: Phase, tasks: list[str]) -> None:
        if phase.prepare is not None:
            data = phase.parts[0].data
            device = device_of(self._model)
            parts = {task: Prepared(self._part(task, data), task, device) for task in tasks}
            phase.prepare(self._model, parts)

    def begin(self, stretch: Stretch) -> None:
        """Let each task's turn say what trains."""
        for task, turn in stretch.turns.items():
            for key, parameter in self._own[task].items():
                parameter.requires_grad_(turn.trains(key))
            for parameter in self._heads[task]:
                parameter.requires_grad_(turn.heads)
            if self._model.plan(task) is self._model.sharing:
                for key, parameter in self.shared.items():
                    parameter.requires_grad_(turn.trains(key))

    def loaders(self, stretch: Stretch) -> dict[str, Loader]:
        """By task, this process's training batches of a stretch."""
        found = {}
        for task, turn in stretch.turns.items():
            if (task, turn.data) not in self._shares:
                self._shares[task, turn.data] = share_of_process(
                    self._part(task, turn.data), self._processes.index, self._processes.count, task
                )
            found[task] = self._shares[task, turn.data]
        return found

    def _part(self, task: str, data: tuple[float, float]) -> Loader:
        if (task, data) not in self._parts:
            self._parts[task, data] = slice_loader(self._train[task], data, self._seed, task)
        return self._parts[task, data]

    def after_update(self, epoch: int, update: int) -> None:
        """Run transitions that are due, while the gradients of the update are still there.

        Args:
            epoch: the epoch.
            update: the optimiser step, counted from 0 in each epoch.
        """
        for phase, tasks in _tasks_of_each(self.of(epoch)):
            if phase.transition is not None and self._is_due(phase, tasks[0], epoch, update):
                own: dict[str, Mapping[str, Tensor]]
                own = {task: dict(self._model.tasks[task].own) for task in tasks}
                gradients = {task: {k: t.grad for k, t in own[task].items()} for task in tasks}
                with torch.no_grad():
                    phase.transition(self._model, own, gradients)

    def reviews(self, epoch: int, update: int) -> list[tuple[Phase, list[str], float]]:
        """The phases that review an update, their tasks, and how much of each phase is done.

        Args:
            epoch: the epoch.
            update: the optimiser step, counted from 0 in each epoch.
        """
        found = []
        for phase, tasks in _tasks_of_each(self.of(epoch)):
            if phase.review is not None and self._is_due(phase, tasks[0], epoch, update):
                done, whole = self._steps_of(phase, tasks[0], epoch, update)
                found.append((phase, tasks, done / whole))
        return found

    def limits(self, epoch: int) -> dict[str, float]:
        """By task, the loss over which it does not count in a step."""
        limits = {task: phase.loss_limit for task, phase in self.of(epoch).items()}
        return {task: limit for task, limit in limits.items() if limit is not None}

    def _steps_of(self, phase: Phase, task: str, epoch: int, update: int) -> tuple[int, int]:
        """How many optimiser steps of a phase are done after an update, and how many it has."""
        start = self._start(task, phase)
        end = start + sum(p is phase for p in self._course[task])
        return sum(self._updates[start:epoch]) + update + 1, sum(self._updates[start:end])

    def _is_due(self, phase: Phase, task: str, epoch: int, update: int) -> bool:
        done, whole = self._steps_of(phase, task, epoch, update)
        return done == whole if phase.every is None else done % phase.every == 0


def _tasks_of_each(phases: Mapping[str, Phase]) -> list[tuple[Phase, list[str]]]:
    """Every different phase with the tasks that are in it."""
    found: dict[int, tuple[Phase, list[str]]] = {}
    for task, phase in phases.items():
        found.setdefault(id(phase), (phase, []))[1].append(task)
    return list(found.values())
