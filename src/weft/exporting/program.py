"""Graphs by torch.export: captured, stripped of what concerns this machine, stored and run."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import BytesIO, StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from weft.core.rows import Arguments
from weft.errors import ExportError

from .batches import Example
from .checking import Run, reason

ABOUT = "weft.json"
"""The extra file of a program that says what it is."""

CAPTURED_ROWS = 2
"""Rows of the batch that a graph is captured on; sizes of 0 and 1 would be taken for fixed."""


def capture(network: nn.Module, example: Example, task: str) -> ExportedProgram:
    """The graph of a network, for any number of rows.

    Args:
        network: on the CPU, in eval mode.
        example: what to capture it on; nothing of it stays in the program.
        task: for messages.

    Raises:
        ExportError: torch.export finds no graph, with what it found.
    """
    args, kwargs = example.batch(CAPTURED_ROWS)
    shapes = example.dynamic(Dim("rows", min=1))
    try:
        forward = _named(network.forward, example.arguments)
        network.forward = forward
        with quiet(), torch.no_grad(), _fused_layers_apart():
            program = torch.export.export(
                network, args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch has many for this
        raise ExportError(
            f"torch.export finds no graph for '{task}': {reason(error)}. A graph holds no "
            "Python code that goes on by a value or by the number of rows. Rewrite that part of "
            "the base or the head, for instance with torch.where; format='safetensors' works "
            "without a graph."
        ) from error
    _forget(program, (args, kwargs))
    return program


def program_bytes(program: ExportedProgram, about: Mapping[str, str]) -> bytes:
    """A ``.pt2`` file that says about itself, in its extra file `ABOUT`, what it is.

    Raises:
        ExportError: the program holds what has no form on disk.
    """
    buffer = BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(dict(about))})
    except Exception as error:  # torch has many for this, too
        raise ExportError(
            f"torch.export.save cannot store the program: {reason(error)}. Heads return "
            "tensors, or tuples, lists and dicts of them."
        ) from error
    return buffer.getvalue()


def program_runner(data: bytes) -> Run:
    """What the program in a file's bytes computes."""
    with quiet():
        module = torch.export.load(BytesIO(data)).module()
    return lambda batch: module(*batch[0], **batch[1])


def _named(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """A function of any arguments, with names for those that it will get.

    torch.export does not find its way through ``**kwargs``, and names inputs by the signature.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _forget(program: ExportedProgram, batch: Arguments) -> None:
    """Take out rows of the user's data and paths of the user's machine."""
    program.example_inputs = pytree.tree_map_only(Tensor, torch.zeros_like, batch)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextmanager
def _fused_layers_apart() -> Iterator[None]:
    """Keep attention from PyTorch's fused kernels, which other runtimes do not have."""
    enabled: Any = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


NOISY = ("torch.onnx", "torch.fx.experimental.symbolic_shapes")
"""Loggers of exporters that tell users of what is none of their business, or of what is raised."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters say about themselves on the way."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # torch.export prints the graph that it gave up on.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
