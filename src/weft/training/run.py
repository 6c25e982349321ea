"""One run of training, advanced an epoch at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.sharing import Taken
from weft.core.together import SharedInputs
from weft.errors import DataWarning, TrainingError

from .batches import Batches, Loader, Reader, to_device
from .checkpoint import changing, put_back, restore, snapshot
from .evaluation import Scores, choosing_scores, evaluate, together_scores
from .history import Callback, Epoch, History, Row
from .loaders import reseed
from .optimization import OptimizerChoice
from .phases import Phases, Stretch
from .processes import Processes
from .progress import Display
from .randomness import derived_seed, seed_everything
from .selection import Selection
from .settings import Settings
from .step import (
    Figures,
    TrainingStep,
    check_parameters,
    check_reached,
    figures_of,
    problem_with,
    sum_of,
)
from .updates import Updates


class Run:
    """Everything that a run holds between two epochs.

    Args:
        model: the model, on the accelerator's device; whatever may train requires gradients.
        train: by task, training batches; these tasks are fitted.
        validation: by task, validation batches, where there are any.
        steps: batches in an epoch.
        settings: what was asked for.
        optimizer: a name or a function of parameter groups.
        accelerator: device, precision and processes.

    Raises:
        PlanError: nothing trains.
        TrainingError: too few epochs for the phases of a plan.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        train: Mapping[str, Loader],
        validation: Mapping[str, Loader],
        steps: int,
        settings: Settings,
        optimizer: OptimizerChoice,
        accelerator: Accelerator,
    ) -> None:
        self.model = model
        self.tasks = tuple(train)
        self.history = History()
        self.epoch = 0
        self._train = train
        self._validation = validation
        self._processes = Processes(accelerator)
        self._phases = Phases(model, train, steps, settings, self._processes)
        self._steps = steps
        self._set = settings
        self._accelerator = accelerator
        self._stopped = False
        self._joint = bool(model.shared_trainable())
        self._selection = Selection(
            tuple(validation), joint=self._joint, patience=settings.patience
        )
        courses = {task: self._phases.updates_between_restarts(task) for task in self.tasks}
        self._updates = Updates(model, self.tasks, courses, settings, optimizer, accelerator)
        with warnings.catch_warnings():
            # Its successor is not in every torch that this library runs on.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._step = accelerator.prepare(TrainingStep(model, settings.weights))
        self._last = snapshot(model, self.tasks)
        self._start = self._last if self._phases.restarts else None

    # ------------------------------------------------------------------ an epoch

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the run was stopped."""
        return self._stopped or self.epoch >= self._set.epochs

    def one_epoch(self, display: Display, callbacks: Sequence[Callback]) -> dict[str, Row]:
        """Train, validate and write down one epoch.

        Args:
            display: what a person sees.
            callbacks: called at its end.

        Returns:
            By task, the epoch's row.
        """
        started = time.perf_counter()
        phases = self._phases.of(self.epoch)
        seeds = self._begin()
        display.begin(self.epoch, phases[self.tasks[0]].name)
        means = self._train_steps(seeds, display)
        self._average_statistics()
        check_parameters(self._updates.parameters, self.epoch)
        seconds = round(time.perf_counter() - started, 3)
        scores = self._scores(self.tasks)
        rows: dict[str, Row] = {}
        for task in self.tasks:
            ledger = self.model.ledger(task)
            opened, gates = ledger.open_gates
            rows[task] = {
                "epoch": self.epoch,
                "phase": phases[task].name,
                "loss": means.losses[task],
                "penalty": means.penalty,
                "lr": self._updates.rate(task),
                "seconds": seconds,
                "val": scores.get(task, {}),
                "open_gates": opened,
                "gates": gates,
                "own_fraction": ledger.own_fraction,
            }
            for penalty in self.model.plan(task).penalties:
                rows[task].update(penalty.figures(self.model.tasks[task].own))
        self._last = snapshot(self.model, self.tasks)
        may_stay = {t: s for t, s in scores.items() if phases[t].selectable}
        if self._joint:
            values = together_scores(self.model, may_stay, self._set.weights)
        else:
            values = choosing_scores(self.model, may_stay)
        self._selection.consider(self.epoch, values, self._last)
        for task, row in rows.items():
            self.history.rows.setdefault(task, []).append(row)
        display.end(self.epoch, rows)
        for callback in callbacks:
            callback(Epoch(self.model, self.epoch, rows, self._stop))
        self._stopped = self._processes.any(self._stopped or self._selection.hopeless(self.epoch))
        self.epoch += 1
        return rows

    def _stop(self) -> None:
        self._stopped = True

    def _scores(self, tasks: Collection[str]) -> dict[str, Scores]:
        """Scores on validation, of those tasks that have any.

        They are the same in all processes, also where a model or a device draws while it predicts,
        so that all keep the same epoch.
        """
        seed_everything(derived_seed(self._set.seed, self.epoch, "validation"))
        validation = {t: loader for t, loader in self._validation.items() if t in tasks}
        return self._processes.first(evaluate(self.model, validation))

    def _begin(self) -> dict[str, int]:
        """Seed the epoch and enter its phases; the seeds of the tasks' data.

        A seed per epoch makes a run that goes on from a checkpoint equal to one that never stopped,
        without storing the state of every generator.
        """
        seed, epoch = self._set.seed, self.epoch
        seeds = self._seed_data()
        for phase, tasks in self._phases.beginning(epoch):
            if phase.restart and self._start is not None:
                changed = put_back(self.model, tuple(tasks), self._start, phase.keeps)
                self._updates.forget(changed)
        seed_everything(derived_seed(seed, epoch))  # all processes prepare a phase alike
        self._phases.enter(epoch)
        self._updates.settle()
        seed_everything(derived_seed(seed, epoch, "process", self._processes.index))
        return seeds

    def _seed_data(self) -> dict[str, int]:
        """Seed the generators that loaders have of their own; by task, the seeds."""
        seeds = {t: derived_seed(self._set.seed, self.epoch, "task", t) for t in self.tasks}
        for loaders in (self._train, self._validation):
            for task, loader in loaders.items():
                reseed(loader, seeds[task])
        return seeds

    def _train_steps(self, seeds: Mapping[str, int], display: Display) -> Figures:
        """All steps of the epoch; the means of their numbers over steps and processes."""
        sums = [0.0] * (2 + len(self.tasks))
        self.model.train()
        self._updates.forget_gradients()
        done, updates = 0, 0
        refused: set[str] = set()
        counted: set[str] = set()
        reader = Reader(seeds)
        for stretch in self._phases.stretches(self.epoch):
            self._phases.begin(stretch)
            for figures, batches, boundary in self._stretch(stretch, reader, done):
                refused |= figures.refused
                counted |= figures.losses.keys() - figures.refused
                if boundary:
                    self._update(updates, batches, refused)
                    updates += 1
                    refused.clear()
                numbers = (figures.total, figures.penalty, *figures.losses.values())
                sums = [a + b for a, b in zip(sums, numbers, strict=True)]
                display.step(figures.losses)
            done += stretch.steps
        for task, limit in self._phases.limits(self.epoch).items():
            if not self._processes.any(task in counted):
                warnings.warn(
                    f"No step of epoch {self.epoch + 1} counted for '{task}': its loss was over "
                    f"the limit of its plan, {limit:g}, or no number, each time. Raise the limit, "
                    "or look at its data.",
                    DataWarning,
                    stacklevel=2,
                )
        means = self._processes.mean([value / self._steps for value in sums])
        return Figures(means[0], means[1], dict(zip(self.tasks, means[2:], strict=True)))

    def _stretch(
        self, stretch: Stretch, reader: Reader, done: int
    ) -> Iterator[tuple[Figures, Batches, bool]]:
        """Forward and backward of a stretch's steps, what they saw, and whether an optimiser step
        is due.

        Args:
            stretch: which turns.
            reader: of the epoch's data.
            done: the steps of the epoch before it.
        """
        steps, accumulate = stretch.steps, self._set.accumulate
        charge = {task: turn.penalty for task, turn in stretch.turns.items()}
        limits = self._phases.limits(self.epoch)
        loaders = self._phases.loaders(stretch)
        for index, batches in enumerate(reader.together(loaders, steps)):
            batches = to_device(batches, self._accelerator.device)
            place = index % accumulate
            boundary = place == accumulate - 1 or index == steps - 1
            size = min(accumulate, steps - (index - place))
            number, found = self.epoch * self._steps + done + index, []
            kept = self._kept_statistics(limits)
            for portion, later in self._portions(batches):
                wait = not boundary or later
                with self._accelerator.no_sync(self._step) if wait else nullcontext():
                    result = self._step(portion, charge, later, limits)
                    found.append(figures_of(result))
                    self._check_finite(found[-1], portion, number)
                    self._accelerator.backward(result["total"] / size)
            figures = sum_of(found)
            for task in figures.refused & kept.keys():
                for buffer, before in kept[task]:
                    buffer.copy_(before)
            yield figures, batches, boundary

    def _kept_statistics(self, limits: Mapping[str, float]) -> dict[str, list[tuple[Tensor, ...]]]:
        """By task that may not count in a step, buffers that the step may change, with copies.

        Of those that tasks share the step then leaves no trace at all.
        """
        shared = [(b, b.clone()) for b in self._shared_statistics()] if limits else []
        return {
            task: [*((b, b.clone()) for b in self.model.tasks[task].buffers()), *shared]
            for task in limits
        }

    def _portions(
        self, batches: Mapping[str, tuple[Any, Any]]
    ) -> Iterator[tuple[Mapping[str, tuple[Any, Any]], bool | None]]:
        """What of a step to run at once, and whether more of it comes later."""
        if not self._set.one_at_a_time:
            yield batches, None
            return
        shared = SharedInputs(batches.values())
        for task, batch in batches.items():
            yield {task: shared.take(batch)}, task != self.tasks[-1]

    def _check_finite(
        self, figures: Figures, batches: Mapping[str, tuple[Any, Any]], step: int
    ) -> None:
        problem = problem_with(figures, batches, step)
        if self._processes.any(problem is not None):
            elsewhere = f"The loss of another process at step {step} is not finite."
            raise TrainingError(problem or elsewhere)

    def _update(self, update: int, batches: Batches, refused: Collection[str]) -> None:
        """One optimiser step, the ``update``-th of the epoch, and what follows from it."""
        if self._updates.done == 0:
            check_reached(self.model, self.tasks)
        self._updates()
        self._phases.after_update(self.epoch, update)
        self._updates.forget_gradients()
        self._review(update, batches, refused)

    def _review(self, update: int, batches: Batches, refused: Collection[str]) -> None:
        """Let phases act on what a step saw; processes go on alike from it."""
        changed = False
        for phase, tasks, done in self._phases.reviews(self.epoch, update):
            assert phase.review is not None
            agreed = frozenset(task for task in tasks if self._processes.any(task in refused))
            taken = Taken({task: batches[task] for task in tasks}, agreed, done)
            forget = phase.review(self.model, taken)
            changed = changed or forget is not None
            self._updates.forget(forget or ())
        if changed:
            parts = changing(self.model, self.tasks).values()
            self._processes.copy_first(tensor for part in parts for tensor in part.values())
            self._updates.settle()

    def _average_statistics(self) -> None:
        """Make running statistics one over processes: each saw its own part of the batches.

        The training forward does not read them, and the average of updates is the update with the
        average, so once an epoch gives what once a step would.
        """
        buffers = [b for task in self.tasks for b in self.model.tasks[task].buffers()]
        self._processes.average([*buffers, *self._shared_statistics()])

    def _shared_statistics(self) -> list[Tensor]:
        """The buffers that all tasks change, where they train anything together."""
        if not self._phases.shared:
            return []
        names = self.model.sharing.train_shared
        base = [b for n, b in self.model.base.named_buffers() if n in names]
        return [*base, *self.model.shared.buffers()]

    # ---------------------------------------------------------- stopping and going on

    def end(self) -> None:
        """Put back the state to keep and leave the facts with the tasks."""
        self.history.best = dict.fromkeys(self.tasks, self.epoch - 1)
        if self._set.keep == "best":
            self.history.best |= self._selection.epochs
            restore(self.model, self.tasks, self._selection.kept)
        scores = {t: self.history[t][epoch]["val"] for t, epoch in self.history.best.items()}
        self._seed_data()
        seed_everything(derived_seed(self._set.seed, self.epoch))
        changed = self._phases.conclude(self.epoch)
        scores |= self._scores(changed)
        for task in self.tasks:
            facts = self.model.tasks[task].facts
            facts["history"], val = self.history[task], scores[task]
            facts["metrics"] = {**facts.get("metrics", {}), "val": val}

    @contextmanager
    def back_to_last_epoch_on_error(self) -> Iterator[None]:
        """If anything ends the run early, leave the model as after its last complete epoch."""
        try:
            yield
        except BaseException:
            restore(self.model, self.tasks, self._last)
            raise

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "epoch": self.epoch,
            "stopped": self._stopped,
            "start": self._start,
            "last": self._last,
            "selection": self._selection.state(),
            "rows": self.history.rows,
            **self._updates.state(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: it is of another model or optimiser.
        """
        restore(self.model, self.tasks, state["last"])
        self._updates.load(state)
        self._selection.load(state["selection"])
        self._start, self._last = state["start"], state["last"]
        self.history = History(state["rows"])
        self.epoch, self._stopped = state["epoch"], state["stopped"]
