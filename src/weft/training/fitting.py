"""fit: train one task, or several together, as their plans say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from weft.core.model import MultiTaskModel, check_model
from weft.errors import ConfigError, DataError, PlanError

from . import checkpoint as checkpoints
from .acceleration import flat, given_accelerator, own_accelerator, tracked
from .batches import Endless, Loader, TaskData, sources, to_device
from .evaluation import device_of, modes_kept
from .files import check_writable
from .history import Callback, History
from .loaders import check_loader, check_readers, data_by_task, steps_in
from .optimization import OptimizerChoice
from .progress import Display
from .randomness import Streams, caller_keeps_randomness, derived_seed
from .run import Run
from .schedule import Schedule
from .settings import Settings


def fit(
    model: MultiTaskModel,
    data: Mapping[str, TaskData] | TaskData,
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
    one_at_a_time: bool = False,
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
    trains shared tensors, or clips gradients, or modules draw random numbers (dropout), each task
    gets what it would get alone in as many steps. Under torchrun each process takes its share of
    the rows of every batch, so several processes do what one would do, but for batch normalisation,
    which sees a share at a time, and for losses that are means over a varying number of known
    targets (pixels, labels), which are means over each share.

    The model's mode and the caller's random numbers are as before afterwards.

    Args:
        model: the model; moved to the accelerator's device.
        data: by task, training batches or a pair of training and validation batches. Batches are
            pairs (x, y) or dicts with "labels". Shorter loaders start again. Or, without a dict,
            batches (x, {task: y}) or a pair of them: all tasks of the model on the same inputs.
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
        one_at_a_time: within each step, run the tasks' forwards and backwards one after the other:
            the same gradients, while activations of one task at a time are in memory. Not for plans
            that charge for what a forward records.
        clip: largest norm of the gradients, of all tasks together.
        steps: batches per epoch, if loaders have no length or to cut epochs.
        weights: by task, a factor on its loss.
        keep: the state to end with: "best" on validation, or "last". Tasks without validation data
            keep the last. Tasks that train shared tensors keep the epoch with the best mean score;
            where their metrics differ, that with the least sum of losses, weighted.
        patience: stop after so many epochs without a better validation score of any task. A phase
            that is cut short runs no transition.
        seed: of every epoch's random numbers; the same seed gives the same run.
        precision: mixed precision of Accelerate; validation runs in full precision.
        subset: allow fitting only some tasks of a plan that trains shared tensors, which changes
            the others.
        checkpoint: folder, the same for all processes; a checkpoint is written at the start and
            after each epoch, and a run that finds one of its own goes on from it to the same
            result, whatever state the model is in.
        log: file for the history as JSON lines, rewritten after each epoch.
        trackers: names of Accelerate's trackers, for instance "tensorboard".
        callbacks: called with an `Epoch` after each epoch, in every process.
        progress: whether to show progress, on standard error.
        accelerator: an own Accelerator, instead of one made from ``precision``.

    Returns:
        The history. Gates are final afterwards: closed layers are shared again.

    Raises:
        TaskError: an unknown task, or a loss or metric that is not one number.
        DataError: empty or unusable data.
        ConfigError: an option that cannot work.
        PlanError: a subset of tasks whose plan trains shared tensors, or one task at a time for a
            plan that cannot.
        TrainingError: a loss that is not finite, too few epochs for the plan's phases, a checkpoint
            of another run, or a file that cannot be written.
        Whatever ends a run early, ctrl-C included, the model is at its last complete epoch then,
        with its gates not yet final.
    """
    check_model("fit", model)
    settings = Settings(
        epochs=epochs,
        steps=steps,
        lr=lr,
        head_lr=head_lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_steps=warmup_steps,
        accumulate=accumulate,
        one_at_a_time=one_at_a_time,
        clip=clip,
        keep=keep,
        patience=patience,
        seed=seed,
        weights=dict(weights or {}),
    )
    data = data_by_task(data, model.task_names)
    tasks = _checked_tasks(model, data, subset=subset, one_at_a_time=one_at_a_time)
    settings.check(tasks)
    train, validation = _checked_data(data, exact=checkpoint is not None)
    if patience is not None and not validation:
        raise ConfigError("patience needs validation data: fit(model, {task: (train, val)}).")
    length = steps or max(steps_in(loader, task) for task, loader in train.items())
    folder = None if checkpoint is None else Path(checkpoint)
    file = None if log is None else Path(log)
    if accelerator is None:
        accelerator = own_accelerator(precision, trackers, file)
    else:
        given_accelerator(accelerator, precision, trackers)
    model.to(accelerator.device)
    config = _config(model, tasks, settings, length, optimizer, accelerator.mixed_precision)
    resumed = None
    if folder is not None:
        config["base"] = checkpoints.fingerprint(model)
        resumed = checkpoints.load(folder, config)
    if accelerator.is_main_process:
        for path in (file, None if folder is None else folder / checkpoints.NAME):
            if path is not None:
                check_writable(path)

    with caller_keeps_randomness(accelerator.device), modes_kept(model):
        _build_heads(model, train, seed)
        with _only_these_train(model, tasks):
            run = Run(model, train, validation, length, settings, optimizer, accelerator)
            if resumed is not None:
                run.resume(resumed)

            def save() -> None:
                if accelerator.is_main_process and folder is not None:
                    checkpoints.save(folder, {"config": config, **run.state()})

            shown = progress and accelerator.is_main_process
            with (
                tracked(accelerator, trackers, config),
                Display(shown, epochs, length) as display,
                run.back_to_last_epoch_on_error(),
            ):
                save()
                while not run.finished:
                    rows = run.one_epoch(display, callbacks)
                    accelerator.log(flat(rows), step=run.epoch - 1)
                    save()
                    if accelerator.is_main_process and file is not None:
                        run.history.write(file)
                run.end()
        for task in tasks:
            model.harden(task)
    return run.history


def _checked_tasks(
    model: MultiTaskModel, data: Mapping[str, TaskData], *, subset: bool, one_at_a_time: bool
) -> tuple[str, ...]:
    tasks = tuple(data)
    if not tasks:
        raise ConfigError(
            "fit(model, data) needs data for at least one task: {task: (train, val)}."
        )
    plans = [model.plan(task) for task in tasks]  # an unknown task is refused here
    left_out = [t for t in model.task_names if t not in tasks]
    if model.sharing in plans and model.sharing.trains_shared and left_out and not subset:
        raise PlanError(
            f"'{model.sharing.method}' trains tensors that all tasks use, so fitting only "
            f"{', '.join(tasks)} would change {', '.join(left_out)}. Give data for all of them, "
            "or say subset=True."
        )
    for plan in plans if one_at_a_time else []:
        if any(penalty.needs_records for penalty in plan.penalties):
            raise PlanError(
                f"'{plan.method}' charges all tasks of a step together for what their forwards "
                "record. Leave out fit(one_at_a_time=True)."
            )
    return tasks


def _checked_data(
    data: Mapping[str, TaskData], *, exact: bool
) -> tuple[dict[str, Loader], dict[str, Loader]]:
    """Training and validation batches by task."""
    train: dict[str, Loader] = {}
    validation: dict[str, Loader] = {}
    for task, given in data.items():
        pair = given if isinstance(given, tuple) else (given, None)
        if len(pair) != 2:
            raise DataError(
                f"The data of '{task}' is training batches or a pair (train, val), found a tuple "
                f"of {len(pair)}."
            )
        check_loader(pair[0], task, exact=exact)
        train[task] = pair[0]
        if pair[1] is not None:
            check_loader(pair[1], task, exact=exact)
            validation[task] = pair[1]
    check_readers(train)
    return train, validation


def _config(
    model: MultiTaskModel,
    tasks: tuple[str, ...],
    settings: Settings,
    steps: int,
    optimizer: OptimizerChoice,
    precision: str,
) -> dict[str, Any]:
    """What a run was asked for, in plain values, to recognise its checkpoints."""
    plans = {t: [model.plan(t).method, str(sorted(model.plan(t).options.items()))] for t in tasks}
    return {
        **settings.plain(),
        "steps": steps,
        "precision": precision,
        "optimizer": optimizer if isinstance(optimizer, str) else "custom",
        "tasks": list(tasks),
        "plans": plans,
    }


def _build_heads(model: MultiTaskModel, train: Mapping[str, Loader], seed: int) -> None:
    """Build heads that are sized by the base's output from the first batch of their data."""
    model.eval()
    waiting = {t: loader for t, loader in train.items() if not model.tasks[t].head_is_built}
    streams = Streams({task: derived_seed(seed, "head", task) for task in waiting})
    for source in sources(waiting):
        for task, (x, _) in source.split(Endless(source, streams).next()).items():
            with streams.of(task), torch.no_grad():
                model.step({task: to_device(x, device_of(model))}, charge={task: 0.0})


@contextmanager
def _only_these_train(model: MultiTaskModel, tasks: tuple[str, ...]) -> Iterator[None]:
    """Nothing else requires gradients, or travels between processes, in this block."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for name in model.task_names:
        if name not in tasks:
            model.tasks[name].requires_grad_(False)
    if all(model.plan(task) is not model.sharing for task in tasks):
        for parameter in model.shared_trainable().values():
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
