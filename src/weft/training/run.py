"""One run of training, advanced an epoch at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import nn

from weft.core.model import MultiTaskModel
from weft.errors import PlanError, TrainingError

from .batches import Loader, to_device, together
from .checkpoint import put_back, restore, snapshot
from .evaluation import evaluate, score_of
from .history import Callback, Epoch, History, Row
from .loaders import reseed
from .optimization import OptimizerChoice, PullToBase, make_optimizer, parameter_groups
from .phases import Phases, Stretch
from .processes import Processes
from .progress import Display
from .randomness import derived_seed, seed_everything
from .schedule import rate_factor
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
        self._updates = 0
        joint = bool(model.shared_trainable())
        self._selection = Selection(tuple(validation), joint=joint, patience=settings.patience)
        groups = parameter_groups(
            model,
            self.tasks,
            lr=settings.lr,
            head_lr=settings.head_lr,
            weight_decay=settings.weight_decay,
        )
        if not groups:
            raise PlanError(
                f"Nothing trains for {', '.join(self.tasks)}: the plan owns nothing and the head "
                "has no parameters."
            )
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._inner = make_optimizer(optimizer, groups, settings.momentum)
        self._pull = PullToBase(model, self.tasks, self._inner, settings.weight_decay)
        self._rates: list[float] = [group["lr"] for group in self._inner.param_groups]
        stretches = self._phases.updates_between_restarts()
        self._factor = rate_factor(settings.schedule, stretches, settings.warmup_steps)
        self._optimizer = accelerator.prepare(self._inner)
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
        check_parameters(self._parameters, self.epoch)
        seconds = round(time.perf_counter() - started, 3)
        scores = evaluate(self.model, self._validation)
        rows: dict[str, Row] = {}
        for task in self.tasks:
            ledger = self.model.ledger(task)
            opened, gates = ledger.open_gates
            rows[task] = {
                "epoch": self.epoch,
                "phase": phases[task].name,
                "loss": means.losses[task],
                "penalty": means.penalty,
                "lr": self._set.lr * self._factor(self._updates - 1),
                "seconds": seconds,
                "val": scores.get(task, {}),
                "open_gates": opened,
                "gates": gates,
                "own_fraction": ledger.own_fraction,
            }
            for penalty in self.model.plan(task).penalties:
                rows[task].update(penalty.figures(self.model.tasks[task].own))
        self._last = snapshot(self.model, self.tasks)
        values = {t: score_of(self.model, t, s) for t, s in scores.items() if phases[t].selectable}
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

    def _begin(self) -> dict[str, int]:
        """Seed the epoch and enter its phases; the seeds of the tasks' data.

        A seed per epoch makes a run that goes on from a checkpoint equal to one that never stopped,
        without storing the state of every generator.
        """
        seed, epoch = self._set.seed, self.epoch
        seeds = {task: derived_seed(seed, epoch, "task", task) for task in self.tasks}
        for loaders in (self._train, self._validation):
            for task, loader in loaders.items():
                reseed(loader, seeds[task])
        for phase, tasks in self._phases.beginning(epoch):
            if phase.restart and self._start is not None:
                for tensor in put_back(self.model, tuple(tasks), self._start, phase.keeps):
                    self._inner.state.pop(tensor, None)
        seed_everything(derived_seed(seed, epoch))  # all processes prepare a phase alike
        self._phases.enter(epoch)
        seed_everything(derived_seed(seed, epoch, "process", self._processes.index))
        return seeds

    def _train_steps(self, seeds: Mapping[str, int], display: Display) -> Figures:
        """All steps of the epoch; the means of their numbers over steps and processes."""
        sums = [0.0] * (2 + len(self.tasks))
        self.model.train()
        self._forget_gradients()
        done, updates = 0, 0
        for place, stretch in enumerate(self._phases.stretches(self.epoch)):
            self._phases.begin(stretch)
            if place:
                seeds = {task: derived_seed(seed, place) for task, seed in seeds.items()}
            for figures, boundary in self._stretch(stretch, seeds, done):
                if boundary:
                    self._update(updates)
                    updates += 1
                numbers = (figures.total, figures.penalty, *figures.losses.values())
                sums = [a + b for a, b in zip(sums, numbers, strict=True)]
                display.step(figures.losses)
            done += stretch.steps
        means = self._processes.mean([value / self._steps for value in sums])
        return Figures(means[0], means[1], dict(zip(self.tasks, means[2:], strict=True)))

    def _stretch(
        self, stretch: Stretch, seeds: Mapping[str, int], done: int
    ) -> Iterator[tuple[Figures, bool]]:
        """Forward and backward of a stretch's steps; whether an optimiser step is due after each.

        Args:
            stretch: which turns.
            seeds: by task, of its data.
            done: the steps of the epoch before it.
        """
        steps, accumulate = stretch.steps, self._set.accumulate
        charge = {task: turn.penalty for task, turn in stretch.turns.items()}
        loaders = self._phases.loaders(stretch)
        for index, batches in enumerate(together(loaders, steps, seeds)):
            batches = to_device(batches, self._accelerator.device)
            place = index % accumulate
            boundary = place == accumulate - 1 or index == steps - 1
            size = min(accumulate, steps - (index - place))
            number, found = self.epoch * self._steps + done + index, []
            for portion, later in self._portions(batches):
                wait = not boundary or later
                with self._accelerator.no_sync(self._step) if wait else nullcontext():
                    result = self._step(portion, charge, later)
                    found.append(figures_of(result))
                    self._check_finite(found[-1], portion, number)
                    self._accelerator.backward(result["total"] / size)
            yield sum_of(found), boundary

    def _portions(
        self, batches: Mapping[str, tuple[Any, Any]]
    ) -> list[tuple[Mapping[str, tuple[Any, Any]], bool | None]]:
        """What of a step to run at once, and whether more of it comes later."""
        if not self._set.one_at_a_time:
            return [(batches, None)]
        last = self.tasks[-1]
        return [({task: batch}, task != last) for task, batch in batches.items()]

    def _check_finite(
        self, figures: Figures, batches: Mapping[str, tuple[Any, Any]], step: int
    ) -> None:
        problem = problem_with(figures, batches, step)
        if self._processes.any(problem is not None):
            elsewhere = f"The loss of another process at step {step} is not finite."
            raise TrainingError(problem or elsewhere)

    def _update(self, update: int) -> None:
        """One optimiser step, the ``update``-th of the epoch."""
        if self._updates == 0:
            check_reached(self.model, self.tasks)
        factor = self._factor(self._updates)
        for group, rate in zip(self._inner.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if self._set.clip is not None:
            self._accelerator.clip_grad_norm_(self._parameters, self._set.clip)
        elif self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self._optimizer)
        self._pull()
        self._optimizer.step()
        self._phases.after_update(self.epoch, update)
        self._updates += 1
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _average_statistics(self) -> None:
        """Make running statistics one over processes: each saw its own part of the batches.

        The training forward does not read them, and the average of updates is the update with the
        average, so once an epoch gives what once a step would.
        """
        buffers = [b for task in self.tasks for b in self.model.tasks[task].buffers()]
        if self._phases.shared:
            names = self.model.sharing.train_shared
            buffers += [b for n, b in self.model.base.named_buffers() if n in names]
            buffers += list(self.model.shared.buffers())
        self._processes.average(buffers)

    # ---------------------------------------------------------- stopping and going on

    def end(self) -> None:
        """Put back the state to keep and leave the facts with the tasks."""
        self.history.best = dict.fromkeys(self.tasks, self.epoch - 1)
        if self._set.keep == "best":
            self.history.best |= self._selection.epochs
            restore(self.model, self.tasks, self._selection.kept)
        for task in self.tasks:
            facts, rows = self.model.tasks[task].facts, self.history.rows[task]
            facts["history"] = rows
            val = rows[self.history.best[task]]["val"]
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
        scaler = self._accelerator.scaler
        return {
            "epoch": self.epoch,
            "updates": self._updates,
            "stopped": self._stopped,
            "start": self._start,
            "last": self._last,
            "selection": self._selection.state(),
            "optimizer": self._inner.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rows": self.history.rows,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: it is of another model or optimiser.
        """
        restore(self.model, self.tasks, state["last"])
        try:
            self._inner.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"The checkpoint does not fit this optimiser: {error}. Remove it to start anew."
            ) from error
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._selection.load(state["selection"])
        self._start, self._last = state["start"], state["last"]
        self.history = History(state["rows"])
        self.epoch, self._updates = state["epoch"], state["updates"]
        self._stopped = state["stopped"]
