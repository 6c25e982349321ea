"""Checks: what a file computes against what the model computes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.core.agreement import difference
from weft.core.rows import Arguments
from weft.errors import DataError, ExportError, WeftError

from .batches import Example, described
from .network import Network

COLOURS = re.compile(r"\x1b\[\d+m")

TELLING = (
    re.compile(r"your code specialized it to be a constant \(\d+\)"),  # the number of rows
    re.compile(r"No ONNX function found for .*?(?=\. |$)", re.MULTILINE),
)
"""What exporters say late in their errors, and what matters."""

BLAMED = re.compile(r"The following call raised this error:\n(\s+File .*\n.*)")
"""Where torch.export names the line that it cannot capture."""

Run = Callable[[Arguments], Any]
"""A function of a batch to outputs."""

ROW_COUNTS = (1, 2, 5)
"""How many rows the batches of a check have."""

FOLDED = 1e-5
"""The tolerance for a folded network, relative to an output's largest value."""

ADVICE = (
    "The network does something that depends on how it is run, for instance on the number of rows; "
    "format='safetensors' stores the tensors without a graph."
)
"""What to say about a graph that does not agree."""

MISFIT = (
    "The base does more with a module than to call it, for instance it reads its attributes, which "
    "what folding puts in its place does not have."
)
"""What to say about a folded network that does not agree."""

HALF = 2e-2
"""The tolerance for types of 16 bits and for other devices, whose sums come in another order."""


def expected_outputs(
    model: Run, example: Example, counts: Sequence[int] = ROW_COUNTS
) -> list[tuple[Arguments, Any]]:
    """Batches of several sizes, each with what the model computes.

    Args:
        model: computes it.
        example: what the batches are made of.
        counts: their numbers of rows.

    Raises:
        DataError: the model fails on the example.
    """
    found = []
    for rows in counts:
        batch = example.batch(rows)
        try:
            with torch.no_grad():
                # On another copy: a module may write into its input.
                found.append((batch, model(example.batch(rows))))
        except WeftError:
            raise
        except Exception as error:  # whatever a module of the user's does with other inputs
            raise DataError(
                f"The network fails on the example, {described(batch)}: {error}. Give one batch as "
                "the base takes it: weft.export(..., example=x)."
            ) from error
    return found


def check_folded(
    task: str, network: Network, expected: list[tuple[Arguments, Any]], *, elsewhere: bool
) -> None:
    """Compare a plain network with the model.

    Args:
        task: whose it is.
        network: what folding has made.
        expected: batches with the outputs of the model.
        elsewhere: whether the model computed them on another device, which rounds differently.

    Raises:
        ExportError: it does not run, or its outputs differ.
    """
    tolerance = HALF if elsewhere else FOLDED
    check_agreement(f"The folded network of '{task}'", network.run, expected, tolerance, MISFIT)


def check_agreement(
    what: str,
    run: Run,
    expected: list[tuple[Arguments, Any]],
    tolerance: float,
    advice: str = ADVICE,
) -> float:
    """Compare outputs on batches of several sizes.

    Args:
        what: whose outputs these are, for messages.
        run: what to check.
        expected: batches with the outputs of the model.
        tolerance: of differences, relative to the largest value of an output.
        advice: what to do about it, for messages.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ExportError: the outputs differ in number, shape or values, or there are none.
    """
    worst = 0.0
    for batch, outputs in expected:
        where = f"{what}, on inputs of {described(batch)},"
        try:
            with torch.no_grad():
                found = run(copy.deepcopy(batch))
        except Exception as error:  # whatever a runtime raises
            raise ExportError(
                f"{where} fails where the model runs: {reason(error)}. Nothing was written. "
                f"{advice}"
            ) from error
        ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(outputs)
        if len(ours) != len(theirs):
            raise _disagree(where, f"{len(ours)} outputs, not {len(theirs)}", advice)
        for one, other in zip(ours, theirs, strict=True):
            difference = _difference(one, other, tolerance)
            if isinstance(difference, str):
                raise _disagree(where, difference, advice)
            worst = max(worst, difference)
    return worst


def _difference(found: Any, expected: Any, tolerance: float) -> float | str:
    """How far two outputs are apart, or what is wrong with the first one."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return 0.0 if found == expected else f"{found!r} instead of {expected!r}"
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point():
        tolerance = 0.0
    elif expected.element_size() < 4:
        tolerance = max(tolerance, HALF)
    error = difference(found.double(), expected.double(), floor=1e-6)
    if math.isinf(error):
        return "other values where they are not finite"
    if not error <= tolerance:
        return f"values that differ by {error:.1e} of the largest, more than {tolerance:.0e}"
    return error


def _disagree(where: str, how: str, advice: str) -> ExportError:
    return ExportError(f"{where} gives {how}. Nothing was written. {advice}")


def reason(error: BaseException) -> str:
    """The part of an exporter's long error that says what it met, in one sentence."""
    text = COLOURS.sub("", str(error))
    for telling in TELLING:
        if found := telling.search(text):
            return " ".join(found.group().split())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if where := BLAMED.search(text):
        first = f"{first} ({' '.join(where.group(1).split())})"
    return first.rstrip(".:")
