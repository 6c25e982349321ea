"""``weft export``: one stored task as a file that needs no weft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from weft.assembly import Folder, first_rows, make_loaders, read_task
from weft.bank import Bank
from weft.bases import load_base
from weft.config import read
from weft.core.model import MultiTaskModel
from weft.errors import ConfigError, close_matches
from weft.exporting import SUFFIXES, chosen_format, export
from weft.pretraining import trained_base

from .output import Overrides, out, plain
from .serving import row_shape
from .trained import trained

Source = Annotated[
    Path, typer.Argument(help="The YAML file of the experiment, or a bank's folder.")
]


def export_command(
    source: Source,
    task: Annotated[str, typer.Argument(help="The task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    overrides: Overrides = None,
    format: Annotated[
        str | None,
        typer.Option(help="safetensors, torch or onnx; default: what the file's name ends in."),
    ] = None,
    head: Annotated[bool, typer.Option(help="Whether the head comes along.")] = True,
    base: Annotated[
        str | None,
        typer.Option(help="For a bank: its base, timm:NAME and so on; default as in training."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="For a bank: a file of weights to load into the base.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="For a bank: of one row, for instance 3,224,224.")
    ] = None,
) -> None:
    """Write one task as a file that needs no weft: tensors, a PyTorch program, or ONNX."""
    chosen = _format(format, output)
    graph = chosen != "safetensors"
    if source.is_dir():
        if overrides:
            raise ConfigError("--set belongs to an experiment's YAML file; a bank has none.")
        model, example = _from_bank(source, task, base, weights, input_shape, graph=graph)
    elif base is not None or weights is not None or input_shape is not None:
        raise ConfigError(
            "--base, --weights and --input-shape belong to a bank; here the YAML file says them."
        )
    else:
        model, example = stored_task(source, overrides, task, graph=graph)
    path = export(model, task, output, format=chosen, example=example, head=head)
    out.print(f"Wrote {plain(str(path))}.")


def stored_task(
    config: Path, overrides: list[str] | None, task: str, *, graph: bool = False
) -> tuple[MultiTaskModel, Any]:
    """A model with one task of an experiment, and with ``graph`` one row of its data."""
    experiment = read(config, overrides or ())
    base, stated = trained_base(experiment)
    bank = Bank(Folder(Path(experiment.output)).bank, create=False)
    model = bank.load(base, task, output=experiment.base.output)
    if not graph:
        return model, None
    if task not in experiment.tasks:
        hint = close_matches(task, experiment.tasks)
        raise ConfigError(f"The configuration has no task '{task}'.{hint}")
    data = read_task(experiment, task)
    return model, first_rows({task: make_loaders(experiment, task, data, stated)})


def _from_bank(
    bank: Path,
    task: str,
    base: str | None,
    weights: Path | None,
    input_shape: str | None,
    *,
    graph: bool,
) -> tuple[MultiTaskModel, Any]:
    opened = Bank(bank, create=False)
    told = trained(opened.info(task)["facts"])
    name = base or told.base
    if name is None:
        raise ConfigError(
            f"The bank does not say where its base is from, a {opened.base()['class']}. Name it: "
            "--base timm:NAME, torchvision:NAME, hf:NAME or python:FILE.py:FUNCTION."
        )
    shape = row_shape(input_shape)
    if graph and shape is None:
        raise ConfigError(
            "A graph is captured on an example. Say the shape of one row, --input-shape 3,224,224; "
            "for other inputs than one tensor of numbers export from the experiment's YAML file."
        )
    torch.manual_seed(told.seed)  # as a base that is drawn at random was in training
    stored = weights or (told.weights if base is None else None)
    options = told.options if name == told.base else None
    network, _ = load_base(name, weights=stored, options=options)
    return opened.load(network, task), None if shape is None else torch.randn(1, *shape)


def _format(format: str | None, output: Path) -> Any:
    chosen = chosen_format(format, output)
    if SUFFIXES.get(output.suffix, chosen) != chosen:
        raise ConfigError(f"--output: '{output}' has the name of another format than {format}.")
    return chosen
