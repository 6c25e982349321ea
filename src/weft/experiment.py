"""An experiment from its configuration: base, plan, data, training, bank and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .bank import Bank
from .bases import load_base
from .config import Experiment, TaskSection
from .core.ledger import Ledger
from .core.model import MultiTaskModel
from .core.task import Task
from .data import Augmentation, Loader, Preprocessing, TaskData, load, loader
from .errors import ConfigError, DataError, WeftError, close_matches
from .registry import method
from .reporting import report
from .tasks import task_from_spec
from .training import evaluate, fit


@dataclass(frozen=True)
class Folder:
    """Where an experiment keeps its files.

    Args:
        root: the experiment's ``output``.
    """

    root: Path

    @property
    def bank(self) -> Path:
        """The bank."""
        return self.root / "bank"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    def checkpoint(self, name: str) -> Path:
        """A run's checkpoint."""
        return self.root / "checkpoints" / name

    def history(self, name: str) -> Path:
        """A run's history as JSON lines."""
        return self.root / "history" / f"{name}.jsonl"


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
    base, _ = load_experiment_base(experiment)
    planned = []
    for name, section in experiment.tasks.items():
        chosen = section.method or experiment.method
        try:
            common = method(experiment.method.name, base, **experiment.method.options)
            model = MultiTaskModel(base, common)
            apart = section.method
            sharing = common if apart is None else method(apart.name, base, **apart.options)
            model.add_task(name, task_from_spec({"kind": "regression"}), sharing=sharing)
        except WeftError as error:
            planned.append(PlannedTask(name, chosen.name, None, {}, {}, str(error)))
            continue
        ledger = model.ledger(name)
        own = {row.tensor: row.own for row in ledger.rows if row.own}
        planned.append(PlannedTask(name, chosen.name, ledger, own, sharing.refused))
    return planned


def train(experiment: Experiment, *, progress: bool = True) -> dict[str, dict[str, Any]]:
    """Train every task of an experiment, store the bank, and write the report.

    Tasks that are in the bank already, by the same configuration, are not trained again; an
    interrupted task goes on from its checkpoint.

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
    bank = Bank(folder.bank)
    if len(bank):
        bank.load(base, bank.tasks()[0])  # refuses another base before any work is done
    results: dict[str, dict[str, Any]] = {}
    for group in groups(experiment, base):
        stored = [name for name in group if name in bank]
        for name in stored:
            _check_same(experiment, name, bank.info(name)["facts"])
        if len(stored) == len(group):
            results |= {name: bank.info(name)["facts"]["results"] for name in group}
            continue
        loaders = {name: make_loaders(experiment, sets[name], stated) for name in group}
        model = make_model(experiment, base, {name: sets[name] for name in group}, loaders)
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
    base, stated = load_experiment_base(experiment)
    chosen = tasks or tuple(experiment.tasks)
    for name in chosen:
        if name not in experiment.tasks:
            hint = close_matches(name, experiment.tasks)
            raise ConfigError(f"The configuration has no task '{name}'.{hint}")
    bank = Bank(Folder(Path(experiment.output)).bank)
    model = bank.load(base, *chosen, output=experiment.base.output)
    scores: dict[str, dict[str, float]] = {}
    for name in chosen:
        splits = make_loaders(experiment, read_task(experiment, name), stated)
        if split not in splits:
            raise DataError(f"The data of '{name}' has no split '{split}': {', '.join(splits)}.")
        scores |= evaluate(model, {name: splits[split]})
    return scores


def groups(experiment: Experiment, base: nn.Module) -> list[tuple[str, ...]]:
    """Which tasks train together: all if the plan trains shared tensors, else each alone.

    Raises:
        ConfigError: tasks that must train together are asked to train apart.
    """
    names = tuple(experiment.tasks)
    sharing = method(experiment.method.name, base, **experiment.method.options)
    joint = experiment.train.joint
    if sharing.trains_shared and joint is False:
        raise ConfigError(
            f"train.joint: found false, but '{sharing.method}' trains tensors that its tasks share."
        )
    if joint is None:
        joint = sharing.trains_shared
    return [names] if joint else [(name,) for name in names]


def load_experiment_base(experiment: Experiment) -> tuple[nn.Module, Preprocessing | None]:
    """The base and how its pixels are scaled: as the file says, else as its library says."""
    section = experiment.base
    torch.manual_seed(experiment.seed)  # a base that is drawn at random is the same every time
    base, stated = load_base(section.name, weights=section.weights, options=section.options)
    if section.channels_last:
        # torch's stubs do not know the keyword alone.
        base = base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if section.mean is not None or section.std is not None:
        stated = Preprocessing(mean=section.mean or (0.5,), std=section.std or (0.5,))
    return base, stated


def read_data(experiment: Experiment) -> dict[str, TaskData]:
    """The data of all tasks, checked.

    Raises:
        DataError: data that cannot be trained on.
    """
    return {name: read_task(experiment, name) for name in experiment.tasks}


def read_task(experiment: Experiment, name: str) -> TaskData:
    """The data of one task."""
    section = experiment.data
    return load(
        experiment.tasks[name].data,
        seed=experiment.seed,
        val=section.val,
        test=section.test,
        image_size=section.image_size,
    )


def make_loaders(
    experiment: Experiment, data: TaskData, stated: Preprocessing | None
) -> dict[str, Loader]:
    """A loader for each split that there is."""
    section = experiment.data
    images = data.input_shape is not None and len(data.input_shape) == 3
    preprocessing = (stated or Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)) if images else None
    augmentation = None
    if section.augmentation is not None and images:
        augmentation = Augmentation(**section.augmentation.model_dump())
    return {
        split: loader(
            dataset,
            section.batch_size if split == "train" else section.eval_batch_size,
            train=split == "train",
            augmentation=augmentation if split == "train" else None,
            preprocessing=preprocessing,
            workers=section.workers,
        )
        for split, dataset in data.splits.items()
    }


def make_model(
    experiment: Experiment,
    base: nn.Module,
    sets: Mapping[str, TaskData],
    loaders: Mapping[str, Mapping[str, Loader]],
) -> MultiTaskModel:
    """A model with the tasks of ``sets``, heads sized by the first batch."""
    x, _ = next(iter(next(iter(loaders.values()))["train"]))
    example = pytree.tree_map_only(torch.Tensor, lambda t: t[:1], x)
    chosen = experiment.method
    sharing = method(chosen.name, base, **chosen.options)
    model = MultiTaskModel(base, sharing, example=example, output=experiment.base.output)
    for name, data in sets.items():
        section = experiment.tasks[name]
        own = section.method
        plan = None if own is None else method(own.name, base, **own.options)
        torch.manual_seed(experiment.seed)  # a task's head does not depend on the tasks before it
        model.add_task(name, make_task(name, section, data), sharing=plan)
    return model


def make_task(name: str, section: TaskSection, data: TaskData) -> Task:
    """The task that a section describes, with the classes of its data.

    Raises:
        ConfigError: the number of classes is neither stated nor in the data, or they disagree.
    """
    spec: dict[str, Any] = {"kind": section.kind, **section.options}
    if section.kind in ("classification", "segmentation"):
        if section.classes is None and data.classes is None:
            raise ConfigError(f"tasks.{name}.classes: missing, and the data does not name them.")
        if data.classes is not None and section.classes not in (None, len(data.classes)):
            raise ConfigError(
                f"tasks.{name}.classes: found {section.classes}, the data has {len(data.classes)}."
            )
        spec["classes"] = section.classes if data.classes is None else list(data.classes)
    elif section.classes is not None:
        spec["labels" if section.kind == "binary" else "targets"] = section.classes
    return task_from_spec(spec)


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
