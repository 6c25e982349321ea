"""``weft bank``: look at a bank, check it, remove tasks."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from weft.bank import Bank

from .output import AsJson, BankPath, out, plain, print_json

bank_app = typer.Typer(help="Look at a bank, check it, remove tasks.", no_args_is_help=True)


@bank_app.command("list")
def bank_list(bank: BankPath, as_json: AsJson = False) -> None:
    """List the tasks with what they own."""
    opened = Bank(bank, create=False)
    rows = {name: _line(opened.info(name)) for name in opened.tasks()}
    if as_json:
        print_json(rows)
        return
    table = Table("task", "method", "own parameters", "of the base", "own bytes", "head bytes")
    for name, row in rows.items():
        table.add_row(
            plain(name),
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
    print_json(Bank(bank, create=False).info(task))


@bank_app.command("verify")
def bank_verify(bank: BankPath, as_json: AsJson = False) -> None:
    """Check every file against its hash; exit with 1 if anything is wrong."""
    opened = Bank(bank, create=False)
    problems = opened.verify()
    if as_json:
        print_json({"tasks": len(opened), "problems": [str(p) for p in problems]})
    else:
        for problem in problems:
            out.print(f"[red]damaged:[/red] {plain(str(problem))}", highlight=False)
        if not problems:
            out.print(f"{len(opened)} tasks, all files as they were written.")
    if problems:
        raise typer.Exit(1)


@bank_app.command("remove")
def bank_remove(bank: BankPath, task: Annotated[str, typer.Argument(help="The task.")]) -> None:
    """Remove a task from the bank."""
    Bank(bank, create=False).remove(task)
    out.print(f"Removed {plain(task)}.")


def _line(info: Any) -> dict[str, Any]:
    return {"method": info["plan"]["method"], **info["ledger"]}
