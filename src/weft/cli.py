"""The command line: verbs over the public API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .assembly import Folder
from .bank import Bank
from .config import Experiment, read
from .demo import run_demo
from .doctor import examine
from .errors import ConfigError, WeftError
from .experiment import PlannedTask, dry_run, evaluate_stored, train, trained_base
from .registry import METHODS, options_of
from .reporting import report as write_report

app = typer.Typer(
    help="One base network, many tasks: learn what each task owns and what it shares.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bank_app = typer.Typer(help="Look at a bank, check it, remove tasks.", no_args_is_help=True)
app.add_typer(bank_app, name="bank")

Config = Annotated[Path, typer.Argument(help="The YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: key.of.value=value.", metavar="KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
BankPath = Annotated[Path, typer.Argument(help="The bank's folder.")]

out = Console()


def main() -> None:
    """Run a verb; errors of weft are one message."""
    try:
        app(standalone_mode=True)
    except WeftError as error:
        Console(stderr=True).print(f"[red]error:[/red] {_plain(str(error))}", highlight=False)
        sys.exit(2)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for bank, figure and report.")] = Path(
        "demo-out"
    ),
    epochs: Annotated[int, typer.Option(min=6, help="Epochs per task and method.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train five methods on four digit tasks, store them, and write a report (about a minute)."""
    run_demo(output, epochs=epochs, seed=seed, console=out)


@app.command("train")
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
        _print_json(results)
        return
    _show_results(results)
    folder = Folder(Path(experiment.output))
    out.print(f"Bank: {_plain(str(folder.bank))}   Report: {_plain(str(folder.report))}")


@app.command("eval")
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
        _print_json(scores)
        return
    table = Table("task", "scores", title=f"Scores on {split}")
    for name, values in scores.items():
        table.add_row(_plain(name), "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
    out.print(table)


@app.command()
def fold(
    config: Config,
    task: Annotated[str, typer.Argument(help="The task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file.")],
    overrides: Overrides = None,
) -> None:
    """Write one task as a plain state dict: base.* for the network, head.* for the head."""
    from safetensors.torch import save_file

    if output.suffix != ".safetensors":
        raise ConfigError(f"--output is a .safetensors file, found '{output}'.")
    experiment = read(config, overrides or ())
    base, _ = trained_base(experiment)
    folder = Folder(Path(experiment.output))
    model = Bank(folder.bank).load(base, task, output=experiment.base.output)
    tensors = {f"base.{n}": t for n, t in model.fold(task).state_dict().items()}
    head = model.head(task)
    if head is not None:
        tensors |= {f"head.{n}": t for n, t in head.state_dict().items()}
    # Tied tensors are written under each of their names.
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, output)
    out.print(f"Wrote {_plain(str(output))}: {len(tensors)} tensors.")


@app.command()
def report(
    bank: BankPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures into this folder.")
    ] = None,
) -> None:
    """Write the report of a bank: what each task owns, shares and costs."""
    page = write_report(Bank(bank, create=False), output, figures=figures)
    out.print(f"Wrote {_plain(str(page))}.")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods with their options."""
    rows = [
        {
            "name": name,
            "summary": entry.summary,
            "options": options_of(name),
            "exceptions": {law.name.lower(): why for law, why in entry.exceptions.items()},
        }
        for name, entry in METHODS.items()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("method", "what a task owns", "options")
    for row in rows:
        options: Any = row["options"]
        table.add_row(
            str(row["name"]),
            str(row["summary"]),
            "\n".join(f"{k}={v!r}" for k, v in options.items()),
        )
    out.print(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and check that weft works here."""
    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        table = Table("what", "found", show_header=False)
        for key, value in findings.items():
            table.add_row(key, _plain(str(value)))
        out.print(table)
    if not findings["self-check"].startswith("ok"):
        raise typer.Exit(1)


@bank_app.command("list")
def bank_list(bank: BankPath, as_json: AsJson = False) -> None:
    """List the tasks with what they own."""
    opened = Bank(bank, create=False)
    rows = {name: _line(opened.info(name)) for name in opened.tasks()}
    if as_json:
        _print_json(rows)
        return
    table = Table("task", "method", "own parameters", "of the base", "own bytes", "head bytes")
    for name, row in rows.items():
        table.add_row(
            _plain(name),
            row["method"],
            f"{row['own_parameters']:,}",
            f"{100 * row['own_fraction']:.1f} %",
            f"{row['own_bytes']:,}",
            f"{row['head_bytes']:,}",
        )
    out.print(table)


@bank_app.command("show")
def bank_show(
    bank: BankPath,
    task: Annotated[str, typer.Argument(help="The task.")],
) -> None:
    """Print everything that is stored about a task, as JSON."""
    _print_json(Bank(bank, create=False).info(task))


@bank_app.command("verify")
def bank_verify(bank: BankPath, as_json: AsJson = False) -> None:
    """Check every file against its hash; exit with 1 if anything is wrong."""
    opened = Bank(bank, create=False)
    problems = opened.verify()
    if as_json:
        _print_json({"tasks": len(opened), "problems": [str(p) for p in problems]})
    else:
        for problem in problems:
            out.print(f"[red]damaged:[/red] {_plain(str(problem))}", highlight=False)
        if not problems:
            out.print(f"{len(opened)} tasks, all files as they were written.")
    if problems:
        raise typer.Exit(1)


@bank_app.command("remove")
def bank_remove(bank: BankPath, task: Annotated[str, typer.Argument(help="The task.")]) -> None:
    """Remove a task from the bank."""
    Bank(bank, create=False).remove(task)
    out.print(f"Removed {_plain(task)}.")


def _line(info: Any) -> dict[str, Any]:
    return {"method": info["plan"]["method"], **info["ledger"]}


def _plain(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _show_results(results: dict[str, dict[str, Any]]) -> None:
    table = Table("task", "method", "validation", "test", "owned", "own bytes", "open gates")
    for name, row in results.items():
        scores = {s: next(iter(v.values()), None) for s, v in row["metrics"].items() if v}
        table.add_row(
            _plain(name),
            row["method"],
            *(f"{scores[s]:.4f}" if s in scores else "-" for s in ("val", "test")),
            f"{100 * row['own_fraction']:.1f} %",
            f"{row['own_bytes']:,}",
            f"{row['open_gates']}/{row['gates']}" if row["gates"] else "-",
        )
    out.print(table)


def _show_plan(planned: list[PlannedTask], as_json: bool) -> None:
    if as_json:
        _print_json(
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
        out.print(f"[red]{_plain(title)} cannot be used:[/red] {_plain(planned.problem)}")
        return
    table = Table("tensor", "layer", "elements", "bytes", title=_plain(title))
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
        out.print(f"Left out: {_plain(site)}: {_plain(reason)}.")


__all__ = ["Experiment", "app", "main"]
