"""What commands print, and the arguments that several of them take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Config = Annotated[Path, typer.Argument(help="The YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: key.of.value=value.", metavar="KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
BankPath = Annotated[Path, typer.Argument(help="The bank's folder.")]

out = Console()


def plain(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    """Print a value and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def records(frame: Any) -> Any:
    """The rows of a pandas table as plain values, what is missing as null."""
    return json.loads(frame.to_json(orient="records"))
