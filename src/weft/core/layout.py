"""Where the rows of a batch are in what the modules of a network take and give.

Nothing is assumed about the network: it runs on three rows, on the same rows in turned order, and
on two of them. The axis whose size follows the number of rows is where they are, if what is there
turns as the rows do. A module for which this is not so is left to the modules around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ROUNDING = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""What may differ between the same numbers computed in batches of another size, relative."""

THREE, TURNED, TWO = (0, 1, 2), (1, 2, 0), (0, 1)
"""The rows of the three runs, as places in a batch of three."""


@dataclass(frozen=True)
class Axis:
    """Where the rows are in one tensor.

    Args:
        place: the axis along which the rows follow one another.
        each: how long each row is there.
    """

    place: int
    each: int


@dataclass(frozen=True)
class Rows:
    """Where the rows are in the leaves of one structure of values.

    Args:
        structure: of the values.
        axes: of each leaf, where its rows are; None if it is the same for all rows.
    """

    structure: pytree.TreeSpec
    axes: tuple[Axis | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where the rows are in the calls of one module.

    Args:
        inputs: in its arguments, ``(args, kwargs)``.
        output: in what it gives.
    """

    inputs: Rows
    output: Rows

    @cached_property
    def one_tensor(self) -> tuple[Axis, Axis] | None:
        """Where rows are in the input and in the output, if both are one tensor."""
        ones = (self.inputs.structure == _ONE_INPUT, self.output.structure.is_leaf())
        axes = (*self.inputs.axes, *self.output.axes)
        if not all(ones) or axes[0] is None or axes[1] is None:
            return None
        return axes[0], axes[1]


_ONE_INPUT = pytree.tree_structure(((0,), {}))


@dataclass
class _Seen:
    """What one module took and gave in one run, call by call."""

    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def layouts(
    modules: Mapping[str, nn.Module], run: Callable[[tuple[int, ...]], Any]
) -> dict[str, Layout]:
    """Where the rows are in the calls of every module for which that is certain.

    Args:
        modules: by name, those to look at.
        run: runs the network on rows, given by their places in a batch of three rows, and returns
            what it gives.

    Returns:
        By name; a module is missing that was not called, or that takes or gives a tensor in which
        the rows could not be found. Nothing if rows do not come first in what the network gives,
        or see one another.
    """
    runs, given = [], []
    for places in (THREE, TURNED, TWO):
        with _watched(modules) as seen:
            given.append(run(places))
        runs.append(seen)
    whole = _rows(*given)
    first = Axis(0, 1)
    if whole is None or not whole.axes or any(axis != first for axis in whole.axes):
        return {}
    found = {}
    for name in modules:
        calls = [seen[name] for seen in runs]
        layout = _layout(*calls) if all(seen.outputs for seen in calls) else None
        if layout is not None:
            found[name] = layout
    return found


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, _Seen]]:
    seen = {name: _Seen() for name in modules}
    handles = []
    for name, module in modules.items():
        before, after = _hooks(seen[name])
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hooks(seen: _Seen) -> tuple[Any, Any]:
    # Copies: what a module takes or gives may be written to afterwards.
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.inputs.append(pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.outputs.append(pytree.tree_map_only(Tensor, torch.clone, output))

    return before, after


def _layout(three: _Seen, turned: _Seen, two: _Seen) -> Layout | None:
    """One layout for all calls of a module, or None."""
    if not len(three.outputs) == len(turned.outputs) == len(two.outputs) == len(three.inputs):
        return None
    found: list[Layout] = []
    for call in range(len(three.outputs)):
        inputs = _rows(*(seen.inputs[call] for seen in (three, turned, two)))
        output = _rows(*(seen.outputs[call] for seen in (three, turned, two)))
        if inputs is None or output is None:
            return None
        found.append(Layout(inputs, output))
    layout = found[0]
    apart = any(axis is not None for axis in layout.inputs.axes)
    alike = all(other == layout for other in found)
    return layout if apart and alike and _all_rows(layout.output, three) else None


def _all_rows(output: Rows, seen: _Seen) -> bool:
    """Whether every tensor that a module gives has rows."""
    leaves = pytree.tree_leaves(seen.outputs[0])
    pairs = zip(leaves, output.axes, strict=True)
    tensors = [axis for leaf, axis in pairs if isinstance(leaf, Tensor)]
    return bool(tensors) and None not in tensors


def _rows(three: Any, turned: Any, two: Any) -> Rows | None:
    flat = [pytree.tree_flatten(values) for values in (three, turned, two)]
    structure = flat[0][1]
    if any(other != structure for _, other in flat):
        return None
    axes: list[Axis | None] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            known, axis = _axis(*leaves)
        else:
            known, axis = _equal(leaves), None
        if not known:
            return None
        axes.append(axis)
    return Rows(structure, tuple(axes))


def _axis(three: Tensor, turned: Tensor, two: Tensor) -> tuple[bool, Axis | None]:
    """Whether it is known where the rows are, and where."""
    if three.dim() != two.dim() or three.shape != turned.shape:
        return False, None
    differ = [d for d, (a, b) in enumerate(zip(three.shape, two.shape, strict=True)) if a != b]
    if not differ:
        return _close(three, turned), None
    place = differ[0]
    size = three.shape[place]
    if len(differ) > 1 or size % 3 or size * 2 != two.shape[place] * 3:
        return False, None
    axis = Axis(place, size // 3)
    expected = three.roll(-axis.each, place)
    # Rows that are all alike show nothing about their order.
    noise, signal = _difference(turned, expected), _difference(three, expected)
    certain = _close(turned, expected) and signal > 8.0 * noise
    return certain and _close(two, three.narrow(place, 0, 2 * axis.each)), axis


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors of one shape; of integers, how many differ."""
    if not one.numel():
        return 0.0
    if not one.is_floating_point() and not one.is_complex():
        return float((one != other).sum())
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().masked_fill(same, 0.0).nan_to_num(torch.inf).amax())


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same but for rounding."""
    difference = _difference(one, other)
    if not difference or not one.is_floating_point():
        return not difference
    scale = float(other.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    return difference <= ROUNDING.get(one.dtype, 0.05) * scale


def _equal(values: tuple[Any, ...]) -> bool:
    """Whether values that are not all tensors are the same."""
    try:
        return all(bool(value == values[0]) for value in values)
    except (ValueError, RuntimeError):  # arrays of numpy, for instance
        return False
