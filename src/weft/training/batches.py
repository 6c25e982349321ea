"""Batches: how they are read, and how a step gets one of every task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from weft.errors import DataError

from .randomness import Streams

Loader = Iterable[Any]
"""Batches of one task: pairs (x, y), or dicts with the target under "labels"."""


def split_batch(batch: Any, task: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Args:
        batch: ``(x, y)``, or a dict of tensors with the targets under "labels".
        task: the task's name, for the error.

    Returns:
        Inputs (a tensor, or a tuple or dict of tensors) and targets.

    Raises:
        DataError: the batch is something else.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        return dict(x) if isinstance(x, Mapping) else x, y
    found = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        found += f" of {len(batch)}"
    elif isinstance(batch, Mapping):
        found += f" with {', '.join(map(repr, batch))}"
    raise DataError(f"A batch of '{task}' is a pair (x, y) or a dict with 'labels', found {found}.")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


class Endless:
    """Batches of one task without end: the loader starts again when it is exhausted.

    Args:
        loader: the batches of one pass.
        task: the task's name, for errors.
        streams: what the loader draws comes from the task's own, so that a task sees the same
            batches alone and together with others.
    """

    def __init__(self, loader: Loader, task: str, streams: Streams) -> None:
        self._loader = loader
        self._task = task
        self._streams = streams
        self._iterator: Iterator[Any] | None = None

    def next(self) -> tuple[Any, Any]:
        """Inputs and targets of the next batch.

        Raises:
            DataError: a whole pass gave no batch.
        """
        nothing = object()
        with self._streams.of(self._task):
            for _ in range(2):
                if self._iterator is None:
                    self._iterator = iter(self._loader)
                batch = next(self._iterator, nothing)
                if batch is not nothing:
                    return split_batch(batch, self._task)
                self._iterator = None
        raise DataError(f"The training data of '{self._task}' gave no batch.")


def together(
    loaders: Mapping[str, Loader], steps: int, seeds: Mapping[str, int]
) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Steps that visit every task: shorter loaders start again, so that no data is cut off.

    Args:
        loaders: by task.
        steps: how many steps to give.
        seeds: by task, of its random numbers.

    Returns:
        ``{task: (inputs, targets)}`` for each step.
    """
    streams = Streams(seeds)
    sources = {task: Endless(loader, task, streams) for task, loader in loaders.items()}
    for _ in range(steps):
        yield {task: source.next() for task, source in sources.items()}


def inputs_are_finite(inputs: Any) -> bool:
    """Whether no number of the inputs is NaN or infinite."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
