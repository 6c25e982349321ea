"""Verbs over an experiment: train it, score what it stored, fold one of its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weft.assembly import Folder
from weft.config import read
from weft.dry_run import PlannedTask, dry_run
from weft.errors import ConfigError
from weft.experiment import evaluate_stored, train
from weft.exporting import export

from .exporting import stored_task
from .output import AsJson, Config, Overrides, out, plain, print_json


def train_command(
    config: Config,
    overrides: Overrides = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be owned; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the tasks of an experiment; store them; write a report."""
    experiment = read(config, overrides or ())
    if dry:
        _show_plan(dry_run(experiment), as_json)
        return
    try:
        results = train(experiment, progress=not as_json)
    except KeyboardInterrupt:
        again = "Interrupted. Finished tasks are stored; run the same command again to go on."
        Console(stderr=True).print(again)
        raise typer.Exit(130) from None
    if as_json:
        print_json(results)
        return
    _show_results(results)
    folder = Folder(Path(experiment.output))
    out.print(f"Bank: {plain(str(folder.bank))}   Report: {plain(str(folder.report))}")


def eval_command(
    config: Config,
    overrides: Overrides = None,
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Score stored tasks on a split of their data."""
    scores = evaluate_stored(read(config, overrides or ()), tuple(task or ()), split)
    if as_json:
        print_json(scores)
        return
    table = Table("task", "scores", title=f"Scores on {split}")
    for name, values in scores.items():
        table.add_row(plain(name), "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
    out.print(table)


def fold(
    config: Config,
    task: Annotated[str, typer.Argument(help="The task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file.")],
    overrides: Overrides = None,
) -> None:
    """Write one task as a plain state dict: base.* for the network, head.* for the head."""
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output is a .safetensors file, found '{output}'.")
    model, _ = stored_task(config, overrides, task)
    path = export(model, task, output, format="safetensors")
    out.print(f"Wrote {plain(str(path))}.")


def _show_results(results: dict[str, dict[str, Any]]) -> None:
    table = Table("task", "method", "validation", "test", "owned", "own bytes", "open gates")
    for name, row in results.items():
        scores = {s: next(iter(v.values()), None) for s, v in row["metrics"].items() if v}
        table.add_row(
            plain(name),
            row["method"],
            *(f"{scores[s]:.4f}" if s in scores else "-" for s in ("val", "test")),
            f"{100 * row['own_fraction']:.1f} %",
            f"{row['own_bytes']:,}",
            f"{row['open_gates']}/{row['gates']}" if row["gates"] else "-",
        )
    out.print(table)


def _show_plan(planned: list[PlannedTask], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "name": p.name,
                    "method": p.method,
                    "problem": p.problem,
                    "own": dict(p.own),
                    "refused": dict(p.refused),
                    "ledger": None if p.ledger is None else p.ledger.to_dict(),
                }
                for p in planned
            ]
        )
    else:
        for p in planned:
            _show_planned_task(p)
    if any(p.problem for p in planned):
        raise typer.Exit(2)


def _show_planned_task(planned: PlannedTask) -> None:
    title = f"{planned.name}: {planned.method}"
    if planned.ledger is None:
        out.print(f"[red]{plain(title)} cannot be used:[/red] {plain(planned.problem)}")
        return
    table = Table("tensor", "layer", "elements", "bytes", title=plain(title))
    for row in planned.ledger.rows:
        if row.own:
            table.add_row(row.tensor, row.kind, f"{row.own:,}", f"{row.own_bytes:,}")
    out.print(table)
    ledger = planned.ledger
    upper = "at most " if ledger.open_gates[1] else ""
    out.print(
        f"Owned: {upper}{ledger.own_parameters:,} of {ledger.base_parameters:,} parameters "
        f"({100 * ledger.own_fraction:.1f} %), {ledger.own_bytes:,} bytes with "
        f"{ledger.own_buffers:,} buffer elements; the head comes on top."
    )
    for site, reason in planned.refused.items():
        out.print(f"Left out: {plain(site)}: {plain(reason)}.")
