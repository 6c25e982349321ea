"""An experiment from its configuration: base, plan, data, training, bank and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from .assembly import (
    Folder,
    first_rows,
    load_experiment_base,
    make_loaders,
    make_model,
    make_plan,
    read_data,
    read_task,
    resolved,
    warn_of_data,
)
from .bank import Bank
from .config import Experiment, MethodSection
from .core.model import MultiTaskModel
from .data import Loader
from .errors import ConfigError, DataError, close_matches
from .pretraining import pretrained_base, trained_base
from .reporting import report
from .sizes import share_or_bytes
from .training import evaluate, fit


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
    warn_of_data(experiment, sets)
    every = {name: make_loaders(experiment, name, data, stated) for name, data in sets.items()}
    example = first_rows(every)
    if experiment.pretrain is not None:
        base = pretrained_base(experiment, base, sets, every, example, progress=progress)
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
            model.tasks[name].facts["experiment"] = resolved(experiment, name)
        bank.save(model, *group)
    report(bank, folder.report)
    (folder.root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def within_budget(experiment: Experiment, budget: str) -> Experiment:
    """The same experiment with TAPS's own budget for each task.

    Args:
        experiment: whose method is ``taps``.
        budget: a share of the base's parameters, ``10%``, or bytes, ``300kB``.

    Raises:
        ConfigError: another method, or no budget.
    """
    others = {experiment.method.name} | {
        task.method.name for task in experiment.tasks.values() if task.method is not None
    }
    if others != {"taps"}:
        raise ConfigError(
            f"--budget is TAPS's; the experiment has the method {', '.join(sorted(others))}. Use "
            "method: taps, or compare methods and plan: weft compare, weft plan."
        )
    options = {"budget": share_or_bytes(budget)}
    return experiment.model_copy(
        update={
            "method": _with(experiment.method, options),
            "tasks": {
                name: task.model_copy(
                    update={"method": task.method and _with(task.method, options)}
                )
                for name, task in experiment.tasks.items()
            },
        }
    )


def _with(section: MethodSection, options: Mapping[str, Any]) -> MethodSection:
    return section.model_copy(update={"options": {**section.options, **options}})


def _check_same(experiment: Experiment, name: str, facts: Mapping[str, Any]) -> None:
    was, now = facts.get("experiment"), resolved(experiment, name)
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
