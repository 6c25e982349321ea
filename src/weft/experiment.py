"""An experiment from its configuration: base, plan, data, training, bank and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from .assembly import (
    Folder,
    first_rows,
    load_experiment_base,
    make_loaders,
    make_model,
    make_plan,
    make_task,
    needs_example,
    read_data,
    read_task,
)
from .bank import Bank
from .config import Experiment, MethodSection
from .core.ledger import Ledger
from .core.model import MultiTaskModel
from .core.sites import named_tensors
from .data import Loader, Preprocessing, TaskData
from .errors import ConfigError, DataError, WeftError, close_matches
from .joint import pretrain
from .reporting import report
from .tasks import task_from_spec
from .training import evaluate, fit
from .training.files import write_whole

Loaders = Mapping[str, Mapping[str, Loader]]
"""By task and split."""


@dataclass(frozen=True)
class PlannedTask:
    """What a task would own, before any training.

    Args:
        name: the task.
        method: its plan's method.
        ledger: what it would own at the start; gates that close later own less.
        own: by tensor, the own elements.
        refused: sites that the method leaves out, with the reason.
        problem: why the method cannot be used on this base, or "".
    """

    name: str
    method: str
    ledger: Ledger | None
    own: Mapping[str, int]
    refused: Mapping[str, str]
    problem: str = ""


def dry_run(experiment: Experiment) -> list[PlannedTask]:
    """What every task would own: each tensor hit, its size, and each refusal with its reason."""
    base, stated = load_experiment_base(experiment)
    example = None
    if any(map(needs_example, _methods(experiment))):
        first = next(iter(experiment.tasks))
        loaders = make_loaders(experiment, first, read_task(experiment, first), stated)
        example = first_rows({first: loaders})
    planned = []
    for name, section in experiment.tasks.items():
        chosen = section.method or experiment.method
        try:
            common = make_plan(experiment.method, base, example)
            model = MultiTaskModel(base, common)
            apart = section.method
            sharing = common if apart is None else make_plan(apart, base, example)
            model.add_task(name, task_from_spec({"kind": "regression"}), sharing=sharing)
        except WeftError as error:
            planned.append(PlannedTask(name, chosen.name, None, {}, {}, str(error)))
            continue
        ledger = model.ledger(name)
        own = {row.tensor: row.own for row in ledger.rows if row.own}
        planned.append(PlannedTask(name, chosen.name, ledger, own, sharing.refused))
    return planned


def _methods(experiment: Experiment) -> list[MethodSection]:
    own = [section.method for section in experiment.tasks.values() if section.method is not None]
    return [experiment.method, *own]


def train(experiment: Experiment, *, progress: bool = True) -> dict[str, dict[str, Any]]:
    """Train every task of an experiment, store the bank, and write the report.

    With a section ``pretrain`` the base is first trained on all tasks together; its weights are
    kept beside the bank. Tasks that are in the bank already, by the same configuration, are not
    trained again; an interrupted task goes on from its checkpoint.

    Args:
        experiment: the checked configuration.
        progress: whether to show progress.

    Returns:
        By task: ``{"metrics": {"val": {...}, "test": {...}}, "own_bytes": ..., ...}``.

    Raises:
        ConfigError: a task is in the bank by another configuration.
    """
    folder = Folder(Path(experiment.output))
    base, stated = load_experiment_base(experiment)
    sets = read_data(experiment)
    every = {name: make_loaders(experiment, name, data, stated) for name, data in sets.items()}
    example = first_rows(every)
    if experiment.pretrain is not None:
        base = _pretrained(experiment, base, sets, every, example, progress=progress)
    bank = Bank(folder.bank)
    if len(bank):
        bank.load(base, bank.tasks()[0])  # refuses another base before any work is done
    results: dict[str, dict[str, Any]] = {}
    for group in groups(experiment, base, example):
        stored = [name for name in group if name in bank]
        for name in stored:
            _check_same(experiment, name, bank.info(name)["facts"])
        if len(stored) == len(group):
            results |= {name: bank.info(name)["facts"]["results"] for name in group}
            continue
        loaders = {name: every[name] for name in group}
        model = make_model(experiment, base, {name: sets[name] for name in group}, example)
        run = group[0] if len(group) == 1 else "joint"
        settings = experiment.train.model_dump(exclude={"joint"})
        fit(
            model,
            {name: (splits["train"], splits.get("val")) for name, splits in loaders.items()},
            **settings,
            seed=experiment.seed,
            checkpoint=folder.checkpoint(run),
            log=folder.history(run),
            progress=progress,
        )
        for name in group:
            results[name] = _score(model, name, loaders[name])
            model.tasks[name].facts["experiment"] = _resolved(experiment, name)
        bank.save(model, *group)
    report(bank, folder.report)
    (folder.root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def trained_base(experiment: Experiment) -> tuple[nn.Module, Preprocessing | None]:
    """The base that an experiment's tasks stand on, and how its pixels are scaled.

    Raises:
        ConfigError: it was to be trained first and has not been, or by another configuration.
    """
    base, stated = load_experiment_base(experiment)
    if experiment.pretrain is not None:
        file = Folder(Path(experiment.output)).base
        if not file.is_file():
            raise ConfigError(f"The base is not trained yet: there is no {file}. Run weft train.")
        _fill(base, file, _pretraining(experiment))
    return base, stated


def _pretrained(
    experiment: Experiment,
    base: nn.Module,
    sets: Mapping[str, TaskData],
    loaders: Loaders,
    example: Any,
    *,
    progress: bool,
) -> nn.Module:
    """The base trained on all tasks together, from its file if it has been trained already."""
    folder = Folder(Path(experiment.output))
    made_by = _pretraining(experiment)
    if folder.base.is_file():
        _fill(base, folder.base, made_by)
        return base
    assert experiment.pretrain is not None
    training = partial(
        fit,
        **experiment.pretrain.model_dump(),
        seed=experiment.seed,
        checkpoint=folder.base.with_name("checkpoint"),
        log=folder.base.with_name("history.jsonl"),
        progress=progress,
    )
    torch.manual_seed(experiment.seed)
    trained = pretrain(
        base,
        {name: make_task(name, experiment.tasks[name], data) for name, data in sets.items()},
        {name: (splits["train"], splits.get("val")) for name, splits in loaders.items()},
        training=training,
        example=example,
        output=experiment.base.output,
    )
    tensors = {name: t.detach().contiguous() for name, t in named_tensors(trained)}
    write_whole(folder.base, save(tensors, {"experiment": made_by}))
    return trained


def _pretraining(experiment: Experiment) -> str:
    """What decides the weights of a base that is trained first, as text."""
    parts = experiment.model_dump(mode="json", include={"base", "data", "pretrain", "seed"})
    tasks = {n: s.model_dump(mode="json", exclude={"method"}) for n, s in experiment.tasks.items()}
    return json.dumps({**parts, "tasks": tasks}, sort_keys=True)


@torch.no_grad()
def _fill(base: nn.Module, file: Path, made_by: str) -> None:
    """Load a trained base's weights.

    Raises:
        ConfigError: they were trained by another configuration, or are damaged.
    """
    try:
        with safe_open(file, "pt") as stored:
            was = (stored.metadata() or {}).get("experiment")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except Exception as error:  # what a damaged file raises depends on its bytes
        raise ConfigError(f"{file} cannot be read: {error}. Remove it to train anew.") from error
    if was != made_by:
        raise ConfigError(
            f"{file} was trained by another configuration of base, data, tasks, pretrain or seed. "
            "Use another output, or remove it to train anew."
        )
    for name, tensor in named_tensors(base):
        tensor.copy_(tensors[name])


def _resolved(experiment: Experiment, name: str) -> dict[str, Any]:
    """What decides a task's result, in plain values."""
    whole = experiment.model_dump(mode="json", exclude={"tasks", "output"})
    task = experiment.tasks[name].model_dump(mode="json")
    return {**whole, "method": task.pop("method") or whole["method"], "task": task}


def _check_same(experiment: Experiment, name: str, facts: Mapping[str, Any]) -> None:
    was, now = facts.get("experiment"), _resolved(experiment, name)
    if was == now:
        return
    bank = Folder(Path(experiment.output)).bank
    ways = f"Use another output, or remove the task: weft bank remove {bank} {name}"
    if not was:
        raise ConfigError(f"Task '{name}' is in the bank, but not from an experiment. {ways}.")
    changed = [key for key in now if was.get(key) != now[key]]
    found = "; ".join(f"{key} was {was.get(key)}, now {now[key]}" for key in changed)
    raise ConfigError(f"Task '{name}' is in the bank by another configuration: {found}. {ways}.")


def evaluate_stored(
    experiment: Experiment, tasks: tuple[str, ...] = (), split: str = "test"
) -> dict[str, dict[str, float]]:
    """The scores of stored tasks on a split of their data.

    Args:
        experiment: the checked configuration, trained before.
        tasks: which; default all.
        split: "train", "val" or "test".

    Raises:
        DataError: a task has no such split.
    """
    base, stated = trained_base(experiment)
    chosen = tasks or tuple(experiment.tasks)
    for name in chosen:
        if name not in experiment.tasks:
            hint = close_matches(name, experiment.tasks)
            raise ConfigError(f"The configuration has no task '{name}'.{hint}")
    bank = Bank(Folder(Path(experiment.output)).bank)
    model = bank.load(base, *chosen, output=experiment.base.output)
    scores: dict[str, dict[str, float]] = {}
    for name in chosen:
        splits = make_loaders(experiment, name, read_task(experiment, name), stated)
        if split not in splits:
            raise DataError(f"The data of '{name}' has no split '{split}': {', '.join(splits)}.")
        scores |= evaluate(model, {name: splits[split]})
    return scores


def groups(experiment: Experiment, base: nn.Module, example: Any) -> list[tuple[str, ...]]:
    """Which tasks train together: all if the plan trains shared tensors, else each alone.

    Raises:
        ConfigError: tasks that must train together are asked to train apart.
    """
    names = tuple(experiment.tasks)
    sharing = make_plan(experiment.method, base, example)
    joint = experiment.train.joint
    if sharing.trains_shared and joint is False:
        raise ConfigError(
            f"train.joint: found false, but '{sharing.method}' trains tensors that its tasks share."
        )
    if joint is None:
        joint = sharing.trains_shared
    return [names] if joint else [(name,) for name in names]


def _score(model: MultiTaskModel, name: str, splits: Mapping[str, Loader]) -> dict[str, Any]:
    """Test scores and costs of a trained task, left with its facts as well."""
    facts = model.tasks[name].facts
    if "test" in splits:
        facts["metrics"]["test"] = evaluate(model, {name: splits["test"]})[name]
    results = {
        **model.ledger(name).to_dict(),
        "method": model.plan(name).method,
        "metrics": facts["metrics"],
        "seconds": round(sum(row["seconds"] for row in facts["history"]), 3),
        "torch": metadata.version("torch"),
        "machine": platform.machine(),
    }
    facts["results"] = results
    return results
