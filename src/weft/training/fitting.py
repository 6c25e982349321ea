"""fit: train one task, or several together, as their plans say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from weft.core.model import MultiTaskModel
from weft.errors import ConfigError, PlanError

from . import checkpoint as checkpoints
from .batches import Loader, split_batch, steps_in, to_device
from .evaluation import device_of
from .history import Callback, History
from .optimization import OptimizerChoice
from .progress import Display
from .run import Course, Run, Settings, seed_everything
from .schedule import Schedule, phase_of_each_epoch

TaskData = Loader | tuple[Loader, Loader | None]
"""Training batches of a task, alone or with validation batches."""


def fit(
    model: MultiTaskModel,
    data: Mapping[str, TaskData],
    *,
    epochs: int = 30,
    lr: float = 0.01,
    head_lr: float | None = None,
    optimizer: OptimizerChoice = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
    steps: int | None = None,
    weights: Mapping[str, float] | None = None,
    keep: Literal["best", "last"] = "best",
    patience: int | None = None,
    seed: int = 0,
    precision: Literal["no", "fp16", "bf16"] = "no",
    subset: bool = False,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    trackers: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> History:
    """Train tasks; tasks that are not named, and the base, do not change by a bit.

    One task trains alone; several train together, one batch of each per step. Unless the plan
    trains shared tensors this gives each task what it would get alone.

    Args:
        model: the model; moved to the accelerator's device.
        data: by task, training batches or a pair of training and validation batches. Batches are
            pairs (x, y) or dicts with "labels". Shorter loaders start again.
        epochs: passes over the longest loader.
        lr: learning rate of own and shared tensors; plans may scale it per group.
        head_lr: learning rate of heads; default ``lr``.
        optimizer: "sgd", "adamw", or a function of parameter groups to a torch optimiser.
        momentum: of "sgd".
        weight_decay: for the groups that take it; tuned copies of base tensors decay towards the
            base.
        schedule: "cosine" to zero, or "constant".
        warmup_steps: optimiser steps over which the rate rises from zero.
        accumulate: batches per optimiser step; their gradients are averaged.
        clip: largest norm of the gradients.
        steps: batches per epoch, if loaders have no length or to cut epochs.
        weights: by task, a factor on its loss.
        keep: the state to end with: "best" on validation, or "last".
        patience: stop after so many epochs without a better validation score.
        seed: of every epoch's random numbers; the same seed gives the same run.
        precision: mixed precision of Accelerate.
        subset: allow fitting only some tasks of a plan that trains shared tensors, which changes
            the others.
        checkpoint: folder; a checkpoint is written after each epoch, and a run that finds one of
            its own goes on from it to the same result.
        log: file for the history as JSON lines, rewritten after each epoch.
        trackers: names of Accelerate's trackers, for instance "tensorboard".
        callbacks: called with an `Epoch` after each epoch.
        progress: whether to show progress.
        accelerator: an own Accelerator, instead of one made from ``precision``.

    Returns:
        The history. Gates are final afterwards: closed layers are shared again.

    Raises:
        TaskError: an unknown task.
        DataError: empty or unusable data.
        PlanError: a subset of tasks whose plan trains shared tensors.
        TrainingError: a loss that is not finite, too few epochs for the plan's phases, or a
            checkpoint of another run. The model is then back at its last complete epoch.
    """
    tasks = _checked_tasks(model, data, subset)
    pairs = {t: d if isinstance(d, tuple) else (d, None) for t, d in data.items()}
    train = {t: pair[0] for t, pair in pairs.items()}
    validation = {t: pair[1] for t, pair in pairs.items() if pair[1] is not None}
    for task, loader in validation.items():
        if isinstance(loader, DataLoader):
            steps_in(loader, task)
    settings = Settings(
        epochs=epochs,
        steps=steps or max(steps_in(loader, t) for t, loader in train.items()),
        lr=lr,
        head_lr=head_lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_steps=warmup_steps,
        accumulate=accumulate,
        clip=clip,
        keep=keep,
        patience=patience,
        seed=seed,
        precision=precision,
        weights=dict(weights or {}),
    )
    settings.check()
    course: Course = {
        t: phase_of_each_epoch(model.plan(t).phases, epochs, model.plan(t).method) for t in tasks
    }
    folder = None if checkpoint is None else Path(checkpoint)
    config = _config(model, tasks, settings, optimizer)
    resumed = None if folder is None else checkpoints.load(folder, config)
    accelerator = accelerator or _accelerator(precision, trackers, log)
    model.to(accelerator.device)
    _build_heads(model, train, seed)

    with _only_these_train(model, tasks):
        run = Run(model, tasks, train, validation, course, settings, optimizer, accelerator)
        if resumed is not None:
            run.resume(resumed)
        if trackers:
            accelerator.init_trackers("weft", config={k: str(v) for k, v in config.items()})
        shown = progress and accelerator.is_main_process
        with Display(shown, epochs, settings.steps) as display, run.back_to_last_epoch_on_error():
            while not run.finished:
                rows = run.one_epoch(display, callbacks)
                if trackers:
                    accelerator.log(_flat(rows), step=run.epoch - 1)
                if accelerator.is_main_process and folder is not None:
                    checkpoints.save(folder, {"config": config, **run.state()})
                if accelerator.is_main_process and log is not None:
                    run.history.write(Path(log))
        run.end()
        if trackers:
            accelerator.end_training()
    for task in tasks:
        model.harden(task)
    return run.history


def _checked_tasks(
    model: MultiTaskModel, data: Mapping[str, TaskData], subset: bool
) -> tuple[str, ...]:
    tasks = tuple(data)
    if not tasks:
        raise ConfigError(
            "fit(model, data) needs data for at least one task: {task: (train, val)}."
        )
    plans = [model.plan(task) for task in tasks]
    sharers = [t for t in model.task_names if model.plan(t) is model.sharing]
    left_out = [t for t in sharers if t not in tasks]
    if model.sharing in plans and model.sharing.trains_shared and left_out and not subset:
        raise PlanError(
            f"'{model.sharing.method}' trains tensors that all its tasks share, so fitting only "
            f"{', '.join(tasks)} would change {', '.join(left_out)}. Give data for all of them, "
            "or say subset=True."
        )
    return tasks


def _config(
    model: MultiTaskModel, tasks: tuple[str, ...], settings: Settings, optimizer: OptimizerChoice
) -> dict[str, Any]:
    """What a run was asked for, in plain values, to recognise its checkpoints."""
    plans = {t: [model.plan(t).method, str(sorted(model.plan(t).options.items()))] for t in tasks}
    choice = optimizer if isinstance(optimizer, str) else "custom"
    return {**settings.plain(), "optimizer": choice, "tasks": list(tasks), "plans": plans}


def _accelerator(precision: str, trackers: Sequence[str], log: str | Path | None) -> Accelerator:
    # Which parameters a step uses can differ between phases; buffers are not one for all
    # processes, because each normalises its own part of a batch.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    folder = Path(log).parent if log is not None else Path("runs")
    try:
        return Accelerator(
            mixed_precision=precision,
            log_with=list(trackers) or None,
            project_dir=str(folder) if trackers else None,
            kwargs_handlers=[ddp],
        )
    except ValueError as error:
        raise ConfigError(
            f"Accelerate cannot start with precision='{precision}' and trackers="
            f"{list(trackers)}: {error}. One process uses one precision: start a new one, or "
            "give fit an accelerator."
        ) from error


def _build_heads(model: MultiTaskModel, train: Mapping[str, Loader], seed: int) -> None:
    """Build heads that are sized by the base's output from the first batch of their data."""
    waiting = [t for t in train if not model.tasks[t].head_is_built]
    if not waiting:
        return
    seed_everything(seed)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for task in waiting:
            for batch in train[task]:
                x, _ = to_device(split_batch(batch, task), device_of(model))
                model.step({task: x}, charge={task: 0.0})
                break
    model.train(was_training)


@contextmanager
def _only_these_train(model: MultiTaskModel, tasks: tuple[str, ...]) -> Iterator[None]:
    """Other tasks' tensors neither train nor travel between processes in this block."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for name in model.task_names:
        if name not in tasks:
            model.tasks[name].requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _flat(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Rows as the flat numbers that trackers take."""
    flat: dict[str, float] = {}
    for task, row in rows.items():
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        numbers |= {f"val/{k}": v for k, v in row["val"].items()}
        flat |= {f"{task}/{k}": float(v) for k, v in numbers.items()}
    return flat
