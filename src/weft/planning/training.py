"""A plan trained: what was chosen, from its file alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from weft.bank import Bank
from weft.comparing import Comparison, Fleet, run_fleet
from weft.comparing.cells import Cell
from weft.comparing.config import MethodChoice
from weft.comparing.sources import seen_from
from weft.config import Experiment
from weft.errors import PlanError, TrainingError
from weft.schema import validated

from .assembling import gather


def train_plan(
    plan: str | Path, output: str | Path | None = None, *, jobs: int = 1, progress: bool = True
) -> Bank:
    """Turn a plan into a bank: train what was chosen, each with its method, settings and seed.

    What the comparison kept is taken as it is. Interrupted, it goes on when called again.

    Args:
        plan: the file that `weft.plan` wrote from the folder of a comparison. Relative paths in it
            are seen from its ``directory``, the folder in which it was made.
        output: the folder for training and bank; default ``chosen`` beside the plan.
        jobs: processes that train at the same time, >= 1.
        progress: whether to show progress.

    Returns:
        The bank, in ``output/bank``. Tasks that were trained together load together.

    Raises:
        PlanError: the file is no plan, or of a table, or the folder it was made in is gone.
        DataError: data that cannot be read.
        TrainingError: a training failed.
    """
    file = Path(plan)
    root = Path(output) if output is not None else file.parent / "chosen"
    cells = _cells(_read(file), file, root)
    missing = [cell for cell in cells if not _kept(cell)]
    if missing:
        fleet = Fleet(_comparison(missing, root / "training"), tuple(missing))
        result = run_fleet(fleet, jobs=jobs, progress=progress)
        if result.failed:
            reasons = "; ".join(f"{name}: {why}" for name, why in result.failed.items())
            raise TrainingError(f"Not all of the plan could be trained. {reasons}")
        if result.elsewhere:
            raise TrainingError(
                f"Another process trains {', '.join(result.elsewhere)}. Wait for it, and run again."
            )
    return gather(cells, Bank(root / "bank"))


def _kept(cell: Cell) -> bool:
    return cell.finished and cell.folder.bank.is_dir()


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise PlanError(f"The plan cannot be read: {error}. Run weft plan first.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise PlanError(f"{file} is no plan: {error}.") from error
    if not isinstance(found, dict) or "tasks" not in found or "budget_bytes" not in found:
        raise PlanError(f"{file} is no plan. Give the plan.yaml that weft plan wrote.")
    if not found.get("cells"):
        raise PlanError(
            f"{file} does not say how to train: it was made from a table, or by an older weft. Run "
            "weft plan on the folder of the comparison."
        )
    return found


def _cells(content: dict[str, Any], file: Path, root: Path) -> list[Cell]:
    """The cells of a plan: where the comparison kept them, else where they are to be trained.

    The comparison is where the plan says, or around the plan, if it was moved with it.

    Raises:
        PlanError: they are not kept, and paths are seen from a folder that is gone.
    """
    directory = file.parent / content.get("directory", Path.cwd())
    compared = [directory / content["comparison"]] if content.get("comparison") else []
    cells = []
    for name, entry in content["cells"].items():
        stated = validated(Experiment, {**entry["experiment"], "output": ""})
        parts = {key: value for key, value in entry.items() if key != "experiment"}
        places = [place / "cells" / name for place in (*compared, file.parent, root / "training")]
        made = [
            Cell(name=name, experiment=stated.model_copy(update={"output": str(p)}), **parts)
            for p in places
        ]
        found = next((cell for cell in made if _kept(cell)), made[-1])
        cells.append(replace(found, experiment=_seen_from(found.experiment, directory, file)))
    return cells


def _seen_from(experiment: Experiment, directory: Path, file: Path) -> Experiment:
    """The same with its relative paths seen from the folder in which the plan was made."""
    base = experiment.base
    tasks = {
        name: task.model_copy(update={"data": seen_from(task.data, directory)})
        for name, task in experiment.tasks.items()
    }
    weights = base.weights and str(directory.resolve() / Path(base.weights).expanduser())
    update = {"name": seen_from(base.name, directory), "weights": weights}
    found = experiment.model_copy(update={"base": base.model_copy(update=update), "tasks": tasks})
    if not directory.is_dir() and found != experiment:
        specs = [base.name, *(task.data for task in experiment.tasks.values())]
        raise PlanError(
            f"{file} was made in {directory}, which is gone, and relative paths in it are seen "
            f"from there: {', '.join(specs)}. If they moved, say where to in the file, directory: "
            "PATH, from the file's own folder or absolute."
        )
    return found


def _comparison(cells: list[Cell], root: Path) -> Comparison:
    """The comparison that has just these cells."""
    first = cells[0].experiment
    choices = {}
    for cell in cells:
        method = cell.experiment.method
        content = {"name": method.name, "options": method.options}
        if cell.experiment.pretrain is not None:
            stated = cell.experiment.pretrain.model_dump(exclude={"precision", "trackers"})
            content["pretrain"] = stated
        choices[cell.label] = validated(MethodChoice, content)
    tasks = {task: c.experiment.tasks[task] for c in cells for task in c.tasks}
    return Comparison(
        base=first.base,
        tasks=tasks,
        methods=tuple(
            choice.model_copy(
                update={"tasks": tuple(t for c in cells if c.label == label for t in c.tasks)}
            )
            for label, choice in choices.items()
        ),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        data=first.data,
        train=first.train,
        output=str(root),
        seed=first.seed,
    )
