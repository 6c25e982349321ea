"""The command line: verbs over the public API."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from weft.demo import run_demo
from weft.doctor import examine
from weft.errors import DataWarning, WeftError
from weft.registry import METHODS, options_of
from weft.reporting import report as write_report

from .banks import bank_app
from .comparing import compare_command
from .experiments import eval_command, fold, train_command
from .exporting import export_command
from .merging import merge_command
from .output import AsJson, out, plain, print_json
from .planning import plan_command
from .serving import serve

app = typer.Typer(
    help="One base network, many tasks: learn what each task owns and what it shares.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run a verb; errors of weft are one message, and so are warnings about data."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, DataWarning):
                _say("[yellow]warning:[/yellow]", str(message))
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        try:
            app(standalone_mode=True)
        except WeftError as error:
            _say("[red]error:[/red]", str(error))
            sys.exit(2)


def _say(what: str, text: str) -> None:
    Console(stderr=True).print(f"{what} {plain(text)}", highlight=False)


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


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A bank, or the output of weft compare.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path(
        "report.html"
    ),
    budget: Annotated[
        str | None, typer.Option(help="Of a comparison: whose plan is shown; as for weft plan.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures into this folder.")
    ] = None,
) -> None:
    """Write the report of a bank or of a comparison as one HTML file."""
    page = write_report(folder, output, budget=budget, figures=figures)
    out.print(f"Wrote {plain(str(page))}.")


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
        print_json(rows)
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
        print_json(findings)
    else:
        table = Table("what", "found", show_header=False)
        for key, value in findings.items():
            table.add_row(key, plain(str(value)))
        out.print(table)
    if not findings["self-check"].startswith("ok"):
        raise typer.Exit(1)


app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("plan")(plan_command)
app.command("fold")(fold)
app.command("merge")(merge_command)
app.command("serve")(serve)
app.command("export")(export_command)
app.add_typer(bank_app, name="bank")

__all__ = ["app", "main"]
