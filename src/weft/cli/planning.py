"""``weft plan``: what each task should own within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from weft.comparing import read_comparison
from weft.comparing.files import put
from weft.errors import ConfigError, DataError, close_matches
from weft.planning import Plan, assemble, plan, plan_curve
from weft.planning.knapsack import Objective
from weft.sizes import readable_size

from .output import AsJson, out, plain, print_json, records


def plan_command(
    comparison: Annotated[
        Path, typer.Argument(help="The folder of a comparison, or its YAML file.")
    ],
    budget: Annotated[
        list[str],
        typer.Option(help="3MB; 1.5x, the base included; sweep. Several give a curve."),
    ],
    objective: Annotated[str, typer.Option(help="mean or worst, of the tasks.")] = "mean",
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Weight of a task in the mean.", metavar="TASK=NUMBER"),
    ] = None,
    relative_to: Annotated[
        str | None,
        typer.Option(
            help="Count improvements over this method's scores, in percent.", metavar="METHOD"
        ),
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Count the bytes of heads.")] = False,
    max_seeds: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many seeds of each cell.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Budgets of a sweep.")] = 9,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default plan.yaml or curve.csv in the folder."),
    ] = None,
    bank: Annotated[
        Path | None, typer.Option(help="Put the chosen tasks into this new bank.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose what each task should own, best on validation within a budget for all together."""
    folder = _folder(comparison)
    asked = _objective(objective)
    weights = _weights(weight or [])
    if budget == ["sweep"] or len(budget) > 1:
        if bank is not None:
            raise ConfigError("--bank takes one budget, found several.")
        curve = plan_curve(
            folder,
            None if budget == ["sweep"] else budget,
            points=points,
            objective=asked,
            weights=weights,
            heads=heads,
            max_seeds=max_seeds,
            relative_to=relative_to,
        )
        file = output or folder / "curve.csv"
        put(file, curve.to_csv(index=False).encode())
        if as_json:
            print_json(records(curve))
        else:
            _show_curve(curve, relative_to)
            out.print(f"Curve: {plain(str(file))}")
        return
    made = plan(
        folder,
        budget[0],
        objective=asked,
        weights=weights,
        heads=heads,
        max_seeds=max_seeds,
        relative_to=relative_to,
    )
    file = made.write(output or folder / "plan.yaml")
    if as_json:
        print_json(made.to_dict())
    else:
        _show_plan(made)
        out.print(f"Plan: {plain(str(file))}")
    if bank is not None:
        assemble(made, bank)
        if not as_json:
            out.print(f"Bank: {plain(str(bank))}")


def _folder(comparison: Path) -> Path:
    """The folder of a comparison that is named by itself or by its YAML file."""
    if comparison.is_dir():
        return comparison
    if comparison.is_file():
        return Path(read_comparison(comparison).output)
    beside = comparison.parent
    names = [path.name for path in beside.iterdir()] if beside.is_dir() else []
    raise DataError(
        f"There is no '{comparison}'. Give the output of weft compare, or its YAML file."
        + close_matches(comparison.name, names)
    )


def _objective(text: str) -> Objective:
    if text == "mean":
        return "mean"
    if text == "worst":
        return "worst"
    raise ConfigError(f"--objective is mean or worst, found '{text}'.")


def _weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        task, equals, number = text.rpartition("=")
        try:
            weights[task] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--weight is TASK=NUMBER, found '{text}'.")
    return weights


def _show_plan(made: Plan) -> None:
    content = made.to_dict()
    table = Table("task", "method", "validation", "test", "own bytes", "shared bytes")
    for task, line in content["tasks"].items():
        options = " ".join(f"{k}={v}" for k, v in {**line["options"], **line["train"]}.items())
        table.add_row(
            plain(task),
            plain(f"{line['method']} {options}".strip()),
            f"{line['val']:.4f}",
            "-" if line["test"] is None else f"{line['test']:.4f}",
            readable_size(line["own_bytes"]),
            readable_size(line["shared_bytes"]) if line["shared_bytes"] else "-",
        )
    out.print(table)
    aim = f"{content['objective'].capitalize()} over tasks"
    relative = content["relative_to"]
    if relative is not None:
        aim = f"{content['objective'].capitalize()} improvement over {relative} in %"
    compared = Table("at this budget", "validation", "test", "bytes", title=plain(aim))
    rows = [("plan", made.chosen)]
    if made.best_single is not None:
        rows.append((f"best single method: {made.best_single.name}", made.best_single))
    for name, part in rows:
        compared.add_row(
            plain(name),
            _spread(part.val, relative=relative is not None),
            _spread(part.test, relative=relative is not None),
            readable_size(part.bytes),
        )
    out.print(compared)
    counted = f"Budget {readable_size(made.budget)} for {content['counted']}"
    out.print(f"{counted}; the base takes {readable_size(content['base_bytes'])} more.")
    if made.best_single is None:
        out.print("No single method covers every task within this budget.")
    for what, reason in content["left_out"].items():
        out.print(f"Left out: {plain(what)}: {plain(reason)}.")


def _spread(score: tuple[float, float] | None, *, relative: bool) -> str:
    if score is None:
        return "-"
    return f"{score[0]:+.2f} ± {score[1]:.2f}" if relative else f"{score[0]:.4f} ± {score[1]:.4f}"


def _show_curve(curve: Any, relative_to: str | None) -> None:
    table = Table("best single method")
    if relative_to is not None:
        table.title = plain(f"Improvement over {relative_to} in %")
    digits = 4 if relative_to is None else 2
    for name in ("budget", "plan val", "test", "single val", "test", "gain on test"):
        table.add_column(name, no_wrap=True)
    for row in curve.to_dict("records"):
        table.add_row(
            plain(str(row["single"] or "-")),
            readable_size(int(row["budget_bytes"])),
            *(
                f"{row[column]:.{digits}f}"
                for column in ("plan_val", "plan_test", "single_val", "single_test")
            ),
            f"{row['test_gain']:+.{digits}f}",
        )
    out.print(table)
