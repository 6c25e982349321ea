"""Export: one task as a file that others read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.core.model import MultiTaskModel, check_model
from weft.core.rows import Arguments
from weft.errors import ConfigError, TaskError, close_matches

from . import onnx_graph
from .batches import Example, example_of, joined
from .checking import check_agreement, check_folded, expected_outputs
from .files import check_place, write_whole
from .network import (
    Network,
    about,
    about_tasks,
    changes,
    choosing_network,
    device_of,
    eager,
    eager_rows,
    plain_network,
)
from .program import capture, program_bytes, program_runner
from .state import check_state, state_bytes, state_dict

Format = Literal["safetensors", "torch", "onnx"]
"""Tensors alone, a program of torch.export, or an ONNX graph."""

FORMATS: tuple[Format, ...] = get_args(Format)

SUFFIXES: dict[str, Format] = {".safetensors": "safetensors", ".pt2": "torch", ".onnx": "onnx"}
"""What the names of files end in."""

TOLERANCE = {"torch": 1e-5, "onnx": 1e-4}
"""Differences to the model that a check lets pass, relative to an output's largest value."""


def export(
    model: MultiTaskModel,
    task: str | Sequence[str],
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    example: Any = None,
    head: bool = True,
    check: bool = True,
) -> Path:
    """Write one task as a file that needs no weft: its tensors, a PyTorch program, or ONNX.

    The file computes what the model computes in eval mode, for any number of rows. It appears once
    it is complete and checked.

    Args:
        model: the model; it is left alone.
        task: the task; or several, whose program or graph takes an input ``task`` of shape (rows,),
            each row's index into them.
        path: the file; an older one is replaced.
        format: "safetensors" for the state dict (names start with ``base.`` and ``head.``; with
            ``head=False`` they are the base's own); "torch" for a program of ``torch.export``;
            "onnx" for an ONNX graph; None for what the file's name ends in, ``.safetensors``,
            ``.pt2`` or ``.onnx``.
        example: one batch as the model takes it, rows of one suffice; default: the model's
            example. Graphs need one.
        head: whether the head comes along; without it the output is what the head would read.
        check: whether to compare the file with the model on batches of several sizes first.

    Returns:
        The file.

    Raises:
        ConfigError: this is no model, or an unknown format, with close matches, or none where the
            name says none.
        TaskError: no such task, no task at all, or its head is not built yet.
        PlanError: the task has no plain form, for instance because a gate decides for each row.
        DataError: a graph needs an example and there is none, or the base does not take it.
        ExportError: there is no graph, the check fails, or the file cannot be written.
        MissingExtra: ONNX needs an extra that is not installed.
    """
    check_model("export", model)
    place = Path(path)
    format = chosen_format(format, place)
    tasks = _chosen_tasks(task)
    if format == "onnx":
        onnx_graph.check_installed(runtime=check)
    check_place(place)
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(task, str):
            data = _content(model, task, format, example, head=head, check=check)
        elif format == "safetensors" or not head:
            raise ConfigError(
                "Several tasks leave as one graph with their heads: format='torch' or 'onnx', "
                "head=True. Tensors and backbones leave task by task."
            )
        else:
            data = _choosing(model, tasks, format, example_of(model, example), check=check)
    write_whole(place, data)
    return place


def chosen_format(format: str | None, path: Path) -> Format:
    """The format of a file.

    Args:
        format: as it was asked for; None for what the file's name ends in.
        path: the file.

    Raises:
        ConfigError: there is no such format, or the name does not say one.
    """
    if format is None:
        known = SUFFIXES.get(path.suffix)
        if known is None:
            raise ConfigError(
                f"'{path}' ends in none of {', '.join(SUFFIXES)}. Name it so, or give the format: "
                f"{', '.join(FORMATS)}."
            )
        return known
    for one in FORMATS:
        if one == format:
            return one
    raise ConfigError(
        f"There is no format '{format}'. Formats: {', '.join(FORMATS)}."
        + close_matches(str(format), FORMATS)
    )


def _chosen_tasks(task: Any) -> list[str]:
    tasks = [task] if isinstance(task, str) else task
    if not isinstance(tasks, Sequence) or not all(isinstance(name, str) for name in tasks):
        raise TaskError(
            f"A task leaves by its name, or several by theirs in a list; found {task!r}."
        )
    if not tasks:
        raise TaskError("No task is named: the list of tasks is empty.")
    return list(tasks)


def _choosing(
    model: MultiTaskModel, tasks: list[str], format: Format, example: Example, *, check: bool
) -> bytes:
    network = choosing_network(model, tasks)
    sample = example.choosing(len(tasks))
    expected = expected_outputs(eager_rows(model, tasks), sample, (1, 2, len(tasks) + 3))
    name = ", ".join(tasks)
    return _graph(network, sample, format, expected, about_tasks(model, tasks), name, check=check)


def _content(
    model: MultiTaskModel, task: str, format: Format, example: Any, *, head: bool, check: bool
) -> bytes:
    network = plain_network(model, task, head=head)
    sample = None
    known = example is not None or model.example is not None
    if format != "safetensors" or (check and known):
        sample = example_of(model, example)
    expected = [] if sample is None else expected_outputs(eager(model, task, head=head), sample)
    elsewhere = device_of(model).type != "cpu"
    if check:
        check_folded(task, network, expected, elsewhere=elsewhere)
    if elsewhere:
        expected = [(batch, network.run(batch)) for batch, _ in expected]
    told = about(model, task)
    if sample is None or format == "safetensors":
        return _state(network, {**told, **changes(model, task, network)}, head=head, check=check)
    return _graph(network, sample, format, expected, told, task, check=check)


def _graph(
    network: nn.Module,
    sample: Example,
    format: Format,
    expected: list[tuple[Arguments, Any]],
    told: dict[str, str],
    name: str,
    *,
    check: bool,
) -> bytes:
    program = capture(network, sample, name)
    if format == "torch":
        data = program_bytes(program, told)
        run = program_runner(data) if check else None
    else:
        outputs = _output_names(expected[0][1], sample.names)
        data = onnx_graph.onnx_bytes(program, network, sample, outputs, told, name)
        run = onnx_graph.onnx_runner(data) if check else None
    if run is not None:
        check_agreement(f"The {format} file of '{name}'", run, expected, TOLERANCE[format])
    return data


def _state(network: Network, told: dict[str, str], *, head: bool, check: bool) -> bytes:
    tensors = state_dict(network, head=head)
    data = state_bytes(tensors, told)
    if check:
        check_state(data, tensors)
    return data


def _output_names(outputs: Any, inputs: list[str]) -> list[str]:
    """``output`` for a single tensor, ``output_KEY`` for each of several; never an input's name."""
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    paths = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    names = [f"output_{joined(path)}" if path else "output" for path in paths]
    return [f"{name}_" if name in inputs else name for name in names]
