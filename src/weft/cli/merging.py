"""``weft merge``: stored tasks of an experiment made into one set of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from safetensors.torch import save

from weft.assembly import Folder, make_loaders, read_task
from weft.bank import Bank
from weft.config import Experiment, read
from weft.data import Preprocessing
from weft.errors import ConfigError, close_matches
from weft.exporting.files import check_place, write_whole
from weft.merging import Merged, merge
from weft.pretraining import trained_base

from .output import AsJson, Config, Overrides, out, plain, print_json


def merge_command(
    config: Config,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the merged bank and base.")
    ],
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="average, task_arithmetic or ties; or concrete, which learns a mask from "
            "validation inputs without their labels."
        ),
    ] = "task_arithmetic",
    scale: Annotated[
        str | None,
        typer.Option(
            help="Of the merged direction; choose: the best on validation, the default but for "
            "average and a single task."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Of ties: share of entries kept of each task, in (0, 1]; default 0.2."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Merge stored tasks into one base with all their heads."""
    experiment = read(config, overrides or ())
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} exists. Give a new folder.")
    bank = Bank(Folder(Path(experiment.output)).bank, create=False)
    tasks = _tasks(task, bank, experiment)
    base, stated = trained_base(experiment)
    model = bank.load(base, *tasks, output=experiment.base.output)
    wanted = _scale(scale)
    chosen = wanted == "choose" or (wanted is None and how != "average" and len(tasks) > 1)
    data = _validation(experiment, tasks, stated) if chosen or how == "concrete" else None
    found = merge(
        model,
        tasks,
        how=how,  # type: ignore[arg-type]  # checked there
        scale=wanted,
        data=data,
        density=density,
        progress=not as_json,
    )
    # Weights that load into the base by its name: base.weights of another experiment.
    weights = {name: tensor.clone() for name, tensor in found.base.state_dict().items()}
    check_place(output / "base.safetensors")
    write_whole(output / "base.safetensors", save(weights))
    Bank(output / "bank").save(found.model)
    if as_json:
        print_json(_plain(found, output))
    else:
        _show(found, output)


def _tasks(asked: list[str] | None, bank: Bank, experiment: Experiment) -> tuple[str, ...]:
    stored = bank.tasks()
    for name in asked or ():
        if name not in stored:
            raise ConfigError(f"There is no stored task '{name}'.{close_matches(name, stored)}")
    tasks = tuple(asked or (name for name in experiment.tasks if name in stored))
    if not tasks:
        raise ConfigError(f"{bank.path} has none of the experiment's tasks. Run weft train first.")
    return tasks


def _scale(text: str | None) -> float | Literal["choose"] | None:
    if text is None:
        return None
    if text == "choose":
        return "choose"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--scale is a number or choose, found '{text}'.") from None


def _validation(
    experiment: Experiment, tasks: Sequence[str], stated: Preprocessing | None
) -> dict[str, Any]:
    """By task, its validation data."""
    found = {}
    for name in tasks:
        splits = make_loaders(experiment, name, read_task(experiment, name), stated)
        if "val" not in splits:
            raise ConfigError(
                f"'{name}' has no validation data. Give it some, or --scale NUMBER and another "
                "--how than concrete."
            )
        found[name] = splits["val"]
    return found


def _plain(found: Merged, output: Path) -> dict[str, Any]:
    return {
        "how": found.how,
        "scale": found.scale,
        "scores": {str(scale): _numbers(scores) for scale, scores in found.scores.items()},
        "means": _numbers(found.means),
        "task_arithmetic": {str(s): _numbers(scores) for s, scores in found.baseline.items()},
        "warnings": list(found.warnings),
        "bank": str(output / "bank"),
        "base": str(output / "base.safetensors"),
    }


def _numbers(values: Mapping[Any, float]) -> dict[str, float | None]:
    """As JSON has them, which knows neither NaN nor infinity."""
    return {str(key): v if math.isfinite(v) else None for key, v in values.items()}


def _show(found: Merged, output: Path) -> None:
    if found.scores:
        columns = ["scale", *found.model.task_names, "mean"]
        if found.baseline:
            columns.append("task arithmetic, mean")
        # Means are what chose: negative where smaller is better, of losses where metrics differ.
        table = Table(*map(plain, columns), title="Validation; the largest mean is best")
        for scale in found.scores:
            values = found.scores[scale]
            line = [
                *(f"{v:.4f}" for v in values.values()),
                f"{found.means[scale]:.4f}",
            ]
            if found.baseline:
                line.append(f"{found.baseline_means[scale]:.4f}")
            table.add_row(f"{scale:g}", *line, style="bold" if scale == found.scale else "")
        out.print(table)
    for warning in found.warnings:
        out.print(f"[yellow]warning:[/yellow] {plain(warning)}", highlight=False)
    out.print(f"{found.how}, scale {found.scale:g}")
    out.print(
        f"Bank: {plain(str(output / 'bank'))}   Base: {plain(str(output / 'base.safetensors'))}"
    )
