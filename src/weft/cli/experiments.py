"""Verbs over an experiment: train it, score what it stored, fold one of its tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weft.assembly import Folder, read_data, warn_of_data
from weft.auto import Climb, climb, ladder
from weft.comparing import dry_fleet
from weft.config import Experiment, read
from weft.dry_run import PlannedTask, dry_run
from weft.errors import ConfigError
from weft.experiment import evaluate_stored, train, within_budget
from weft.exporting import export
from weft.planning import train_plan
from weft.sizes import readable_size

from .exporting import stored_task
from .output import AsJson, Config, Overrides, out, plain, print_json


def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file of the experiment; none with --plan.")
    ] = None,
    overrides: Overrides = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Train what weft plan chose, from its plan.yaml, in place of CONFIG. Where the "
            "comparison is still there, weft plan --bank needs no training."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Of TAPS: what each task may own at most, 10% of the base (0.1) or 300kB."
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Cheap methods first; stop where a gain is within the noise."),
    ] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Of --auto: trainings of each step.")] = 2,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Of --auto: standard errors that a gain must exceed.")
    ] = 2.0,
    patience: Annotated[
        int, typer.Option(min=1, help="Of --auto: steps without a gain after which a task stops.")
    ] = 2,
    jobs: Annotated[
        int, typer.Option(min=1, help="Of --auto and --plan: trainings at the same time.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Of --plan: default 'chosen' beside the plan."),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be owned; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the tasks of an experiment; store them; write a report."""
    try:
        _refuse_unused(
            {
                "--auto": {
                    "--seeds": not auto and seeds != 2,
                    "--threshold": not auto and threshold != 2.0,
                    "--patience": not auto and patience != 2,
                },
                "--auto and --plan": {"--jobs": not auto and plan is None and jobs != 1},
                "--plan": {"--output": plan is None and output is not None},
            }
        )
        if plan is not None:
            if config is not None or overrides or budget or auto or dry:
                raise ConfigError("--plan stands alone: the plan says what is trained, and how.")
            _train_plan(plan, output, jobs, as_json)
            return
        if config is None:
            raise ConfigError("Give the YAML file of an experiment, or --plan.")
        experiment = read(config, overrides or ())
        if auto:
            if budget is not None:
                raise ConfigError("--auto chooses how much each task owns; leave out --budget.")
            if dry:
                _show_ladder(experiment, seeds, as_json)
                return
            told = None if as_json else lambda text: out.print(plain(text), highlight=False)
            found = climb(
                experiment,
                seeds=seeds,
                threshold=threshold,
                patience=patience,
                jobs=jobs,
                progress=not as_json,
                told=told,
            )
            _show_climb(experiment, found, as_json)
            return
        if budget is not None:
            experiment = within_budget(experiment, budget)
        if dry:
            warn_of_data(experiment, read_data(experiment))
            _show_plan(dry_run(experiment), as_json)
            return
        results = train(experiment, progress=not as_json)
    except KeyboardInterrupt:
        again = "Interrupted. What is finished is stored; run the same command again to go on."
        Console(stderr=True).print(again)
        raise typer.Exit(130) from None
    if as_json:
        print_json(results)
        return
    _show_results(results)
    folder = Folder(Path(experiment.output))
    out.print(f"Bank: {plain(str(folder.bank))}   Report: {plain(str(folder.report))}")


def _refuse_unused(options: dict[str, dict[str, bool]]) -> None:
    """Refuse options that would be ignored: by what they belong to, which were given without it."""
    for owner, given in options.items():
        for option, unused in given.items():
            if unused:
                hint = " Say --set output=FOLDER." if option == "--output" else ""
                raise ConfigError(f"{option} belongs to {owner}. Leave it out.{hint}")


def _train_plan(file: Path, output: Path | None, jobs: int, as_json: bool) -> None:
    bank = train_plan(file, output, jobs=jobs, progress=not as_json)
    if as_json:
        print_json({"bank": str(bank.path), "tasks": list(bank.tasks())})
    else:
        out.print(f"Bank: {plain(str(bank.path))}, with {', '.join(map(plain, bank.tasks()))}")


def _show_ladder(experiment: Experiment, seeds: int, as_json: bool) -> None:
    planned = dry_fleet(ladder(experiment, seeds))
    if as_json:
        print_json(
            {
                label: None
                if task.ledger is None
                else {**task.ledger.to_dict(), "most_bytes": task.most_bytes}
                for label, task in planned.items()
            }
        )
        return
    table = Table("step", "a task would own", title="In this order, while it pays")
    for label, task in planned.items():
        owns = plain(task.problem)
        if task.ledger is not None and task.most_bytes is not None:
            upper = "at most " if task.ledger.open_gates[1] else ""
            owns = f"{upper}{readable_size(task.most_bytes)}"
        table.add_row(plain(label), owns)
    out.print(table)


def _show_climb(experiment: Experiment, found: Climb, as_json: bool) -> None:
    if as_json:
        print_json({name: [asdict(step) for step in steps] for name, steps in found.steps.items()})
        return
    table = Table("task", "owns by", "validation", "test", "own bytes")
    for name, step in found.chosen.items():
        table.add_row(
            plain(name),
            plain(step.method),
            "-" if step.val is None else f"{step.val:.4f}",
            "-" if step.test is None else f"{step.test:.4f}",
            f"{step.own_bytes:,}",
        )
    out.print(table)
    for name in found.chosen:
        out.print(plain(found.summary(name)), highlight=False)
    out.print(f"Bank: {plain(str(found.bank.path))}   Steps: {plain(experiment.output)}/auto.yaml")


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
                    "options": dict(p.options),
                    "most_bytes": p.most_bytes,
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
    if planned.most_bytes is not None and planned.most_bytes < ledger.own_bytes:
        out.print(
            f"The budget leaves at most {readable_size(planned.most_bytes)} of them when training "
            "ends."
        )
    for site, reason in planned.refused.items():
        out.print(f"Left out: {plain(site)}: {plain(reason)}.")
