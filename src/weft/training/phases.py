"""Phases: what trains in an epoch, on which data, and what happens between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase

from .batches import Loader
from .loaders import share_of_process, slice_loader
from .processes import Processes
from .schedule import phase_of_each_epoch
from .settings import Settings


class Phases:
    """The phases of the tasks of one run.

    Args:
        model: the model.
        train: by task, training batches.
        steps: batches in an epoch.
        settings: what was asked for.
        processes: that train together.

    Raises:
        TrainingError: too few epochs for the phases of a plan.
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
        self._updates = settings.updates(steps)
        self._course: dict[str, list[Phase]] = {}
        for task in train:
            plan = model.plan(task)
            self._course[task] = phase_of_each_epoch(plan.phases, settings.epochs, plan.method)
        self._own: dict[str, dict[str, nn.Parameter]] = {t: model.trainable(t) for t in train}
        self.shared = model.shared_trainable()
        self._parts: dict[tuple[str, tuple[float, float]], Loader] = {}
        self._shares: dict[tuple[str, tuple[float, float]], Loader] = {}

    def of(self, epoch: int) -> dict[str, Phase]:
        """By task, the phase of an epoch."""
        return {task: course[epoch] for task, course in self._course.items()}

    def loaders(self, epoch: int) -> dict[str, Loader]:
        """By task, this process's training batches of an epoch."""
        found = {}
        for task, phase in self.of(epoch).items():
            if (task, phase.data) not in self._shares:
                loader = self._part(task, phase)
                self._shares[task, phase.data] = share_of_process(
                    loader, self._processes.index, self._processes.count, task
                )
            found[task] = self._shares[task, phase.data]
        return found

    def _part(self, task: str, phase: Phase) -> Loader:
        if (task, phase.data) not in self._parts:
            loader = slice_loader(self._train[task], phase.data, self._seed, task)
            self._parts[task, phase.data] = loader
        return self._parts[task, phase.data]

    def enter(self, epoch: int) -> None:
        """Let each task's phase say what trains; prepare phases that begin.

        A phase is prepared in eval mode, and on the whole data also where processes divide it.
        """
        phases = self.of(epoch)
        for task, phase in phases.items():
            for key, parameter in self._own[task].items():
                parameter.requires_grad_(phase.trains(key))
            if self._model.plan(task) is self._model.sharing:
                for key, parameter in self.shared.items():
                    parameter.requires_grad_(phase.trains(key))
        for phase, tasks in _tasks_of_each(phases):
            if phase.prepare is not None and self._start(tasks[0], phase) == epoch:
                self._model.eval()
                phase.prepare(self._model, {task: self._part(task, phase) for task in tasks})

    def after_update(self, epoch: int, update: int) -> None:
        """Run transitions that are due, while the gradients of the update are still there.

        Args:
            epoch: the epoch.
            update: the optimiser step, counted from 0 in each epoch.
        """
        for phase, tasks in _tasks_of_each(self.of(epoch)):
            if phase.transition is None:
                continue
            start, course = self._start(tasks[0], phase), self._course[tasks[0]]
            if phase.every is None:
                last = epoch + 1 == len(course) or course[epoch + 1] is not phase
                due = last and update + 1 == self._updates
            else:
                due = ((epoch - start) * self._updates + update + 1) % phase.every == 0
            if due:
                own: dict[str, Mapping[str, Tensor]]
                own = {task: dict(self._model.tasks[task].own) for task in tasks}
                gradients = {task: {k: t.grad for k, t in own[task].items()} for task in tasks}
                with torch.no_grad():
                    phase.transition(self._model, own, gradients)

    def _start(self, task: str, phase: Phase) -> int:
        return next(epoch for epoch, p in enumerate(self._course[task]) if p is phase)


def _tasks_of_each(phases: Mapping[str, Phase]) -> list[tuple[Phase, list[str]]]:
    """Every different phase with the tasks that are in it."""
    found: dict[int, tuple[Phase, list[str]]] = {}
    for task, phase in phases.items():
        found.setdefault(id(phase), (phase, []))[1].append(task)
    return list(found.values())
