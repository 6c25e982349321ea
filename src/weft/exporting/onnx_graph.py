"""Graphs in ONNX: translated from a program, and run by onnxruntime to check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from weft.core.rows import Arguments
from weft.errors import ExportError, MissingExtra

from .batches import Example
from .checking import Run, reason
from .program import quiet

LARGEST = 2**31 - 1
"""Bytes that an ONNX file can hold."""

TRACE = "pkg.torch.onnx.stack_trace"
"""Where the exporter notes lines of source files with their paths."""


def check_installed(*, runtime: bool) -> None:
    """Refuse early if ONNX cannot be written, or checked.

    Raises:
        MissingExtra: the extra is not installed.
    """
    try:
        for library in ("onnx", "onnxscript", *(("onnxruntime",) if runtime else ())):
            import_module(library)
    except ImportError:
        raise MissingExtra("Exporting to ONNX", "onnx") from None


def onnx_bytes(
    program: ExportedProgram,
    network: nn.Module,
    example: Example,
    outputs: Sequence[str],
    about: Mapping[str, str],
    task: str,
) -> bytes:
    """An ONNX file, checked by ``onnx.checker``.

    Args:
        program: the captured graph.
        network: what was captured.
        example: what it was captured on.
        outputs: a name for each tensor that it gives.
        about: what the file says about itself.
        task: for messages.

    Raises:
        ExportError: the network is too large for a file, an operation has no translation, or the
            result is not valid.
    """
    import onnx

    _check_size(network)
    try:
        with quiet():
            translated: Any = torch.onnx.export(
                program,
                input_names=example.names,
                output_names=list(outputs),
                dynamic_shapes=example.dynamic("rows"),
                dynamo=True,
                verbose=False,
            )
            proto = translated.model_proto
            onnx.helper.set_model_props(proto, dict(about))
            for part in (proto.graph, *proto.functions):
                _forget_traces(part)
            onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # each of three libraries has its own
        raise ExportError(
            f"The graph of '{task}' has no form in ONNX: {reason(error)}. Replace that part of "
            "the base or the head; format='torch' and format='safetensors' keep it."
        ) from error
    content: bytes = proto.SerializeToString()
    return content


def onnx_runner(data: bytes) -> Run:
    """What onnxruntime computes by a file's bytes.

    Raises:
        ExportError: it does not accept the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ExportError(
            f"onnxruntime does not run the graph: {reason(error)}. It computes in 32 bits "
            "above all; convert the model with model.float(), or use check=False for another "
            "runtime."
        ) from error
    names = [one.name for one in session.get_inputs()]

    def run(batch: Arguments) -> list[Tensor]:
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        feeds = {name: t.contiguous().numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def _check_size(network: nn.Module) -> None:
    tensors = [*network.parameters(), *network.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if size > LARGEST:
        raise ExportError(
            f"The network has {size:,} bytes, and an ONNX file holds at most {LARGEST:,}. Export "
            "it with format='torch', or halve it first: model.half()."
        )


def _forget_traces(graph: Any) -> None:
    for node in graph.node:
        for prop in [p for p in node.metadata_props if p.key == TRACE]:
            node.metadata_props.remove(prop)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _forget_traces(inner)
