"""``weft compare``: methods side by side on the tasks of one base."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weft.comparing import (
    Fleet,
    FleetResult,
    dry_fleet,
    make_fleet,
    part_of,
    read_comparison,
    run_fleet,
)
from weft.errors import ConfigError
from weft.sizes import readable_size

from .output import AsJson, Config, Overrides, out, plain, print_json, records

MANY_TASKS = 8
"""Up to so many tasks get a column each."""


def compare_command(
    config: Config,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that run at the same time.")] = 1,
    shard: Annotated[
        str, typer.Option(help="i/n: run the i-th of n parts, for machines that share the folder.")
    ] = "1/1",
    device: Annotated[
        list[str] | None,
        typer.Option(help="A CUDA device's number, or cpu; several are dealt to the jobs in turn."),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and what each would own.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train tasks x methods x options x seeds; run it again after an interruption."""
    part = _shard(shard)
    fleet = make_fleet(read_comparison(config, overrides or ()))
    if dry:
        _show_cells(fleet, part, as_json)
        return
    try:
        result = run_fleet(fleet, jobs=jobs, shard=part, devices=device, progress=not as_json)
    except KeyboardInterrupt:
        again = "Interrupted. Finished cells are kept; run the same command again to go on."
        Console(stderr=True).print(again)
        raise typer.Exit(130) from None
    if as_json:
        print_json(
            {
                "rows": records(result.table),
                "failed": dict(result.failed),
                "elsewhere": list(result.elsewhere),
                "waiting": result.waiting,
                "files": [str(path) for path in result.files],
            }
        )
    else:
        _show_result(fleet, result)
    if result.failed:
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard is i/n, for instance 1/4, found '{text}'.")
    return int(index), int(count)


def _show_cells(fleet: Fleet, part: tuple[int, int], as_json: bool) -> None:
    planned = dry_fleet(fleet)
    mine = {cell.name for cell in part_of(fleet.cells, part)}
    rows = [
        {
            "cell": cell.name,
            "tasks": list(cell.tasks),
            "method": cell.label,
            "seed": cell.seed,
            "finished": cell.finished,
            "ledger": None if (own := planned[cell.label].ledger) is None else own.to_dict(),
            "pretrained": bool(cell.pretrained),
            "most_bytes": planned[cell.label].most_bytes,
            "problem": planned[cell.label].problem,
        }
        for cell in fleet.cells
        if cell.name in mine
    ]
    if as_json:
        print_json(rows)
    else:
        _show_dry_rows(rows)
    if any(row["problem"] for row in rows):
        raise typer.Exit(2)


def _show_dry_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each method and group of tasks, with its seeds."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["method"], ", ".join(row["tasks"])), []).append(row)
    table = Table("method", "tasks", "seeds", "finished", "each task would own")
    for (method, tasks), cells in grouped.items():
        ledger = cells[0]["ledger"]
        owns = "[red]not possible[/red]"
        if ledger is not None:
            owns = "at most " if ledger["gates"] else ""
            owns += readable_size(cells[0]["most_bytes"])
            owns += " over a shared copy of the base" if cells[0]["pretrained"] else ""
        done = sum(bool(cell["finished"]) for cell in cells)
        seeds = ", ".join(str(cell["seed"]) for cell in cells)
        table.add_row(plain(method), plain(tasks), seeds, f"{done} of {len(cells)}", owns)
    out.print(table)
    problems = {row["method"]: row["problem"] for row in rows if row["problem"]}
    for method, problem in problems.items():
        out.print(f"[red]{plain(method)}:[/red] {plain(problem)}", highlight=False)
    done = sum(bool(row["finished"]) for row in rows)
    out.print(f"{len(rows)} cells, {done} of them finished.")


def _show_result(fleet: Fleet, result: FleetResult) -> None:
    frame = result.table
    if len(frame):
        tasks = [t for t in fleet.comparison.tasks if t in set(frame["task"])]
        frame = frame.assign(val=frame["val"].astype(float))  # what is missing becomes nan
        means = frame.pivot_table("val", "label", "task", aggfunc="mean", sort=False)
        owned = frame.groupby(["label", "task"], sort=False)["own_bytes"].mean()
        shown = tasks if len(tasks) <= MANY_TASKS else []
        table = Table("method", *map(plain, shown), "mean", "own bytes a task")
        table.title = "Validation, mean over seeds"
        for label, row in means.iterrows():
            values = [row.get(task) for task in shown]
            table.add_row(
                plain(str(label)),
                *("-" if value is None or value != value else f"{value:.4f}" for value in values),
                f"{row.mean():.4f}",
                readable_size(round(owned[label].mean())),
            )
        out.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in result.failed.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        out.print(f"[red]failed:[/red] {plain(', '.join(names))}", highlight=False)
        out.print(f"  {plain(reason)}", highlight=False)
    if result.failed:
        logs = fleet.root / "cells" / "CELL" / "log.txt"
        out.print(f"Tracebacks: {plain(str(logs))}. Failed cells are tried again next time.")
    if result.elsewhere:
        out.print(f"{len(result.elsewhere)} cells are being run by other processes.")
    if result.waiting:
        out.print(f"{result.waiting} of {len(fleet.cells)} cells are not finished.")
    out.print(f"Table: {plain(', '.join(str(path) for path in result.files))}")
    if len(result.files) == 1:
        out.print("For Parquet as well: pip install 'weft-share\\[parquet]'")
    if len(frame):
        root = plain(str(fleet.root))
        out.print(f"Next: weft plan {root} --budget 1.5x   weft report {root}")
