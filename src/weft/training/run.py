"""One run of training, advanced an epoch at a time."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase
from weft.errors import ConfigError, DataError, PlanError, TrainingError

from .batches import Loader, slice_loader, to_device, together
from .checkpoint import restore, snapshot
from .evaluation import Scores, evaluate, higher_is_better
from .history import Callback, Epoch, History, Row
from .optimization import OptimizerChoice, PullToBase, anchors, make_optimizer, parameter_groups
from .progress import Display
from .schedule import Schedule, rate_factor
from .step import TrainingStep, check_finite

Course = dict[str, list[Phase]]
"""By task, the phase of each epoch."""


@dataclass(frozen=True)
class Settings:
    """What `fit` was asked for, in plain values; see there."""

    epochs: int
    steps: int
    lr: float
    head_lr: float | None
    momentum: float
    weight_decay: float
    schedule: Schedule
    warmup_steps: int
    accumulate: int
    clip: float | None
    keep: Literal["best", "last"]
    patience: int | None
    seed: int
    precision: str
    weights: dict[str, float]

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: names the option, what was found and what is expected.
        """
        at_least_one = {"epochs": self.epochs, "steps": self.steps, "accumulate": self.accumulate}
        for name, count in at_least_one.items():
            if count < 1 or int(count) != count:
                raise ConfigError(f"{name} is a whole number of at least 1, found {count!r}.")
        rates = {"lr": self.lr, "head_lr": self.head_lr, "clip": self.clip}
        for name, rate in rates.items():
            if rate is not None and not 0.0 < rate < math.inf:
                raise ConfigError(f"{name} is a positive number, found {rate!r}.")
        if self.keep not in ("best", "last"):
            raise ConfigError(f"keep is 'best' or 'last', found {self.keep!r}.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule is 'cosine' or 'constant', found {self.schedule!r}.")

    def plain(self) -> dict[str, Any]:
        """The settings as a dict."""
        return asdict(self)


class Run:
    """Everything that a run holds between two epochs.

    Args:
        model: the model, on the accelerator's device.
        tasks: what is fitted.
        train: by task, training batches.
        validation: by task, validation batches, where there are any.
        course: by task, the phase of each epoch.
        settings: what was asked for.
        optimizer: a name or a function of parameter groups.
        accelerator: device, precision and processes.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: tuple[str, ...],
        train: Mapping[str, Loader],
        validation: Mapping[str, Loader],
        course: Course,
        settings: Settings,
        optimizer: OptimizerChoice,
        accelerator: Accelerator,
    ) -> None:
        self.model = model
        self.tasks = tasks
        self.history = History()
        self.epoch = 0
        self._train = train
        self._validation = validation
        self._course = course
        self._set = settings
        self._accelerator = accelerator
        self._stopped = False
        self._best: dict[str, float] = {}
        self._kept: dict[str, dict[str, dict[str, Tensor]]] = {}
        self._loaders: dict[tuple[str, tuple[float, float]], Loader] = {}
        self._own = {task: model.trainable(task) for task in tasks}
        self._shared = model.shared_trainable()

        groups = parameter_groups(
            model,
            tasks,
            lr=settings.lr,
            head_lr=settings.head_lr,
            weight_decay=settings.weight_decay,
        )
        if not groups:
            raise PlanError(
                f"Nothing trains for {', '.join(tasks)}: the plan owns nothing and the head has no "
                "parameters."
            )
        self._inner = make_optimizer(optimizer, groups, settings.momentum)
        steps = settings.epochs * math.ceil(settings.steps / settings.accumulate)
        rate = rate_factor(settings.schedule, steps, settings.warmup_steps)
        self._schedule = LambdaLR(self._inner, rate)
        self._parameters = [p for g in groups for p in g["params"]]
        anchored = tuple((self._own[t][k], b) for t in tasks for k, b in anchors(model, t))
        self._pull = PullToBase(anchored, settings.weight_decay, decoupled=optimizer == "adamw")
        self._optimizer = accelerator.prepare(self._inner)
        self._step = accelerator.prepare(TrainingStep(model, settings.weights))
        self._last = snapshot(model, tasks)

    # ------------------------------------------------------------------ an epoch

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the run was stopped."""
        return self._stopped or self.epoch >= self._set.epochs

    def one_epoch(self, display: Display, callbacks: Sequence[Callback]) -> dict[str, Row]:
        """Train, validate and write down one epoch."""
        started = time.perf_counter()
        phases = {task: self._course[task][self.epoch] for task in self.tasks}
        # A seed per epoch makes a run that goes on from a checkpoint equal to one that never
        # stopped, without storing the state of every generator.
        self._reseed()
        self._enter(phases)
        display.begin(self.epoch, phases[self.tasks[0]].name)
        losses, penalty = self._train_steps(phases, display)
        self._average_statistics()
        seconds = time.perf_counter() - started
        scores = evaluate(self.model, self._validation)
        rows = {
            task: self._row(task, phases[task], losses[task], penalty, scores.get(task, {}))
            for task in self.tasks
        }
        for row in rows.values():
            row["seconds"] = round(seconds, 3)
        self._last = snapshot(self.model, self.tasks)
        self._keep_best(phases, scores)
        for task, row in rows.items():
            self.history.rows.setdefault(task, []).append(row)
        display.end(self.epoch, rows)
        for callback in callbacks:
            callback(Epoch(self.model, self.epoch, rows, self._stop))
        self.epoch += 1
        self._stop_without_progress()
        return rows

    def _reseed(self) -> None:
        seed = self._set.seed + 1 + self.epoch
        seed_everything(seed)
        for loader in self._train.values():
            if isinstance(loader, DataLoader) and isinstance(loader.generator, torch.Generator):
                loader.generator.manual_seed(seed)

    def _train_steps(
        self, phases: Mapping[str, Phase], display: Display
    ) -> tuple[dict[str, float], float]:
        steps, accumulate = self._set.steps, self._set.accumulate
        charge = {task: phase.penalty for task, phase in phases.items()}
        sums, penalty = dict.fromkeys(self.tasks, 0.0), 0.0
        self.model.train()
        for index, batches in enumerate(together(self._phase_loaders(phases), steps)):
            batches = to_device(batches, self._accelerator.device)
            place = index % accumulate
            boundary = place == accumulate - 1 or index == steps - 1
            size = min(accumulate, steps - (index - place))
            sync = nullcontext() if boundary else self._accelerator.no_sync(self._step)
            with sync:
                result = self._step(batches, charge)
                check_finite(result, batches, self.epoch * steps + index)
                self._accelerator.backward(result["total"] / size)
            if boundary:
                self._optimizer_step(phases, index)
            losses = {task: float(loss.detach()) for task, loss in result["losses"].items()}
            sums = {task: sums[task] + losses[task] for task in self.tasks}
            penalty += float(result["penalty"].detach())
            display.step(losses)
        return {task: total / steps for task, total in sums.items()}, penalty / steps

    def _optimizer_step(self, phases: Mapping[str, Phase], index: int) -> None:
        if self._set.clip is not None:
            self._accelerator.clip_grad_norm_(self._parameters, self._set.clip)
        elif self._pull.decay:
            self._accelerator.unscale_gradients(self._optimizer)
        self._pull.before_step()
        self._optimizer.step()
        self._pull.after_step(self._schedule.get_last_lr()[0])
        self._transitions(phases, index)
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _average_statistics(self) -> None:
        """Make running statistics one over processes: each saw its own part of the batches.

        The training forward does not read them, and the average of updates is the update with the
        average, so once an epoch gives what once a step would.
        """
        if self._accelerator.num_processes == 1:
            return
        names = self.model.sharing.train_shared
        buffers = [b for task in self.tasks for b in self.model.tasks[task].own.buffers()]
        buffers += [b for n, b in self.model.base.named_buffers() if n in names]
        buffers = [b for b in buffers if b.is_floating_point()]
        if buffers:
            flat = torch.cat([b.reshape(-1) for b in buffers])
            mean = self._accelerator.reduce(flat, reduction="mean")
            for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def _row(self, task: str, phase: Phase, loss: float, penalty: float, scores: Scores) -> Row:
        ledger = self.model.ledger(task)
        opened, gates = ledger.open_gates
        return {
            "epoch": self.epoch,
            "phase": phase.name,
            "loss": loss,
            "penalty": penalty,
            "lr": self._inner.param_groups[0]["lr"],
            "val": scores,
            "open_gates": opened,
            "gates": gates,
            "own_fraction": ledger.own_fraction,
        }

    # -------------------------------------------------------------------- phases

    def _phase_loaders(self, phases: Mapping[str, Phase]) -> dict[str, Loader]:
        """Each task's training data in its phase, divided between the processes."""
        loaders = {}
        for task, phase in phases.items():
            if (task, phase.data) not in self._loaders:
                loader = slice_loader(self._train[task], phase.data, self._set.seed, task)
                if isinstance(loader, DataLoader):
                    loader = self._accelerator.prepare(loader)
                elif self._accelerator.num_processes > 1:
                    raise DataError(
                        f"Several processes divide a DataLoader between them, but the data of "
                        f"'{task}' is a {type(loader).__name__}, which each would see whole."
                    )
                self._loaders[task, phase.data] = loader
            loaders[task] = self._loaders[task, phase.data]
        return loaders

    def _enter(self, phases: Mapping[str, Phase]) -> None:
        """Let each task's phase say what trains; prepare phases that begin."""
        for task, phase in phases.items():
            for key, parameter in self._own[task].items():
                parameter.requires_grad_(phase.trains(key))
            if self.model.plan(task) is self.model.sharing:
                for key, parameter in self._shared.items():
                    parameter.requires_grad_(phase.trains(key))
        for task, phase in _distinct(phases).items():
            begins = self.epoch == 0 or self._course[task][self.epoch - 1] is not phase
            if begins and phase.prepare is not None:
                mine = {t: p for t, p in phases.items() if p is phase}
                phase.prepare(self.model, self._phase_loaders(mine))

    def _transitions(self, phases: Mapping[str, Phase], index: int) -> None:
        """Run transitions that are due after this step, while its gradients are still there."""
        last_step = index == self._set.steps - 1
        for task, phase in _distinct(phases).items():
            if phase.transition is None:
                continue
            following = self._course[task][self.epoch + 1 : self.epoch + 2]
            ends = last_step and (not following or following[0] is not phase)
            done = self.epoch * self._set.steps + index + 1
            if ends if phase.every is None else done % phase.every == 0:
                mine = [t for t, p in phases.items() if p is phase]
                own: dict[str, Mapping[str, Tensor]] = {t: dict(self._own[t]) for t in mine}
                gradients = {t: {k: p.grad for k, p in self._own[t].items()} for t in mine}
                with torch.no_grad():
                    phase.transition(self.model, own, gradients)

    # ------------------------------------------------------------- keeping the best

    def _keep_best(self, phases: Mapping[str, Phase], scores: Mapping[str, Scores]) -> None:
        """Remember the state of an epoch that is the best so far, per task where tasks are apart."""
        if not scores or not all(p.selectable for p in phases.values()):
            return
        values = {task: self._signed(task, scores[task]) for task in scores}
        if self.model.sharing.trains_shared:
            # Tasks that share trained tensors stand and fall together.
            mean = sum(values.values()) / len(values)
            values = dict.fromkeys(self.tasks, mean)
        for task, value in values.items():
            if task not in self._best or value >= self._best[task]:
                self._best[task] = value
                self._kept[task] = self._last
                self.history.best[task] = self.epoch

    def _signed(self, task: str, scores: Scores) -> float:
        metrics = self.model.tasks[task].task.metrics
        for name, metric in metrics.items():
            return scores[name] if higher_is_better(metric) else -scores[name]
        return -scores["loss"]

    def _stop(self) -> None:
        self._stopped = True

    def _stop_without_progress(self) -> None:
        patience = self._set.patience
        if patience is None or not self.history.best:
            return
        if all(self.epoch - 1 - e >= patience for e in self.history.best.values()):
            self._stop()

    def end(self) -> None:
        """Put back the state to keep and leave the facts with the tasks."""
        for task in self.tasks:
            if self._set.keep == "last" or task not in self._kept:
                self.history.best[task] = self.epoch - 1
            else:
                restore(self.model, self._kept[task], only=task)
        if self._set.keep == "best" and self._kept and self.model.sharing.trains_shared:
            restore(self.model, next(iter(self._kept.values())))
        for task in self.tasks:
            facts = self.model.tasks[task].facts
            rows = self.history.rows[task]
            facts["history"] = rows
            facts["metrics"] = {
                **facts.get("metrics", {}),
                "val": rows[self.history.best[task]]["val"],
            }

    # ---------------------------------------------------------- stopping and going on

    @contextmanager
    def back_to_last_epoch_on_error(self) -> Iterator[None]:
        """If anything ends the run early, leave the model as after its last complete epoch."""
        try:
            yield
        except BaseException:
            restore(self.model, self._last)
            raise

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "epoch": self.epoch,
            "stopped": self._stopped,
            "last": self._last,
            "kept": self._kept,
            "best": self._best,
            "optimizer": self._inner.state_dict(),
            "schedule": {"last_epoch": self._schedule.last_epoch},
            "rows": self.history.rows,
            "best_epochs": self.history.best,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        try:
            restore(self.model, state["last"])
            self._inner.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"The checkpoint does not fit this model: {error}. Remove it to start anew."
            ) from error
        self._last, self._kept, self._best = state["last"], state["kept"], state["best"]
        self._schedule.last_epoch = state["schedule"]["last_epoch"]
        self._schedule._last_lr = [g["lr"] for g in self._inner.param_groups]
        self.history = History(state["rows"], state["best_epochs"])
        self.epoch, self._stopped = state["epoch"], state["stopped"]


def _distinct(phases: Mapping[str, Phase]) -> dict[str, Phase]:
    """One task for each different phase."""
    seen: dict[int, str] = {}
    for task, phase in phases.items():
        seen.setdefault(id(phase), task)
    return {task: phases[task] for task in seen.values()}


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, which loaders and augmentations draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
