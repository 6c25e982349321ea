"""Batches: how inputs reach the base, how rows are picked, and how outputs come back in order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import DataError, TaskError, close_matches

Rows = str | int | Sequence[str | int] | Tensor
"""Which task: a name or an index into `task_names`, for all rows or one per row."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of the base."""

Output = str | int | Callable[[Any], Tensor] | None
"""What heads read of the base's output: a key or attribute, an index, a function, or all of it."""


def call_arguments(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of the base: a single tuple or dict of tensors is spread out."""
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        return tuple(inputs[0]), dict(kwargs)
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), {**inputs[0], **kwargs}
    return inputs, dict(kwargs)


def count_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of a batch: the first size of its first tensor."""
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return 0


def chosen_tasks(task: Rows, names: Sequence[str], rows: int) -> str | list[str]:
    """What the caller's choice of tasks means, where it is not simply a name.

    Args:
        task: an index for all rows, or names or indices, one per row.
        names: the names of all tasks, in order.
        rows: how many rows the batch has.

    Returns:
        One name for all rows, or a name per row.

    Raises:
        TaskError: no such task, or no choice at all.
        DataError: the number of tasks differs from the number of rows.
    """
    choice = task.tolist() if isinstance(task, Tensor) else task
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        return known_task(choice, names)
    if len(choice) != rows:
        raise DataError(f"One task per row: found {len(choice)} tasks for {rows} rows.")
    known = dict.fromkeys(names)
    return [one if one in known else known_task(one, names) for one in choice]


def known_task(task: Any, names: Sequence[str]) -> str:
    """The name of one task, given its name or index.

    Raises:
        TaskError: no such task, with close matches.
    """
    if isinstance(task, str):
        if task in names:
            return task
        have = ", ".join(names) or "none yet"
        raise TaskError(f"There is no task '{task}'. Tasks: {have}.{close_matches(task, names)}")
    if isinstance(task, bool):
        raise TaskError(f"A task is a name or an index, found {task}.")
    try:
        index = operator.index(task)
    except TypeError:
        raise TaskError(
            "A task is a name or an integer index into model.task_names, for all rows or one per "
            f"row; found {task!r}."
        ) from None
    if not 0 <= index < len(names):
        raise TaskError(f"Task index {index} is outside 0..{len(names) - 1}.")
    return names[index]


def places(names: Sequence[str]) -> dict[str, list[int]]:
    """By task, the places of its rows in the batch."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


def select_rows(batch: Any, index: Sequence[int], rows: int) -> Any:
    """The given rows of a batch; tensors of one row, or of no dimension, go along whole.

    Args:
        batch: tensors in any structure, each with rows first or the same for all rows.
        index: places of the rows.
        rows: the number of rows of the batch.

    Raises:
        DataError: a tensor has another first size, so what of it belongs to a row is unknown.
    """

    def select(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or (tensor.shape[0] == 1 and rows > 1):
            return tensor
        if tensor.shape[0] != rows:
            raise DataError(
                f"With a task per row every input has rows first, or one row for all: found shape "
                f"{tuple(tensor.shape)} in a batch of {rows} rows. Bring it to rows first, or call "
                "the model once per task."
            )
        return tensor.index_select(0, torch.tensor(index, device=tensor.device))

    return pytree.tree_map_only(Tensor, select, batch)


def select_output(output: Any, which: Output) -> Tensor:
    """What heads read of the base's output.

    Args:
        output: what the base returned.
        which: a key or attribute, an index, a function, or None for a tensor as it is.

    Raises:
        DataError: the base returned a structure and nothing or something wrong was asked for.
    """
    if callable(which):
        value = which(output)
    elif which is None:
        if isinstance(output, Tensor):
            return output
        raise DataError(
            f"The base returns {_describe(output)}, not a tensor. "
            "Say what heads read: MultiTaskModel(base, sharing, output=...)."
        )
    else:
        value = _part(output, which)
    if not isinstance(value, Tensor):
        raise DataError(f"output={which!r} gives {_describe(value)}, not a tensor.")
    return value


def _part(output: Any, which: str | int) -> Any:
    try:
        if isinstance(which, str) and not isinstance(output, Mapping):
            return getattr(output, which)
        return output[which]
    except (AttributeError, KeyError, IndexError, TypeError):
        known = [str(k) for k in output] if isinstance(output, Mapping) else []
        raise DataError(
            f"output={which!r} is not in {_describe(output)}.{close_matches(str(which), known)}"
        ) from None


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


@dataclass(frozen=True)
class Answer:
    """The output of some rows of a batch.

    Args:
        tasks: whose rows they are.
        places: their places in the batch.
        output: of a head, rows first.
    """

    tasks: tuple[str, ...]
    places: Sequence[int]
    output: Any


def assemble(answers: Sequence[Answer]) -> Tensor | list[Any]:
    """The outputs of all rows, in row order.

    Args:
        answers: each row in one of them.

    Returns:
        One tensor if all outputs agree in shape and type, otherwise a list of rows.

    Raises:
        DataError: an output does not have its rows first.
    """
    for answer in answers:
        for leaf in pytree.tree_leaves(answer.output):
            if isinstance(leaf, Tensor) and leaf.shape[:1] != (len(answer.places),):
                raise DataError(
                    "A task per row needs outputs with rows first; the head of "
                    f"'{answer.tasks[0]}' gave shape {tuple(leaf.shape)} for "
                    f"{len(answer.places)} rows."
                )
    if not answers:
        return []
    order = [place for answer in answers for place in answer.places]
    tensors = [answer.output for answer in answers if isinstance(answer.output, Tensor)]
    if len(tensors) == len(answers) and len({(t.shape[1:], t.dtype) for t in tensors}) == 1:
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if order == sorted(order):
            return joined
        inverse = [0] * len(order)
        for row, place in enumerate(order):
            inverse[place] = row
        return joined.index_select(0, torch.tensor(inverse, device=joined.device))
    result: list[Any] = [None] * len(order)
    for answer in answers:
        for i, place in enumerate(answer.places):
            result[place] = pytree.tree_map_only(Tensor, operator.itemgetter(i), answer.output)
    return result
