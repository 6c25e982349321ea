"""Batches of several tasks: where they come from and how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler, Subset

from weft.errors import DataError

Loader = Iterable[Any]
"""Batches of one task: pairs (x, y), or dicts with the target under "labels"."""


def split_batch(batch: Any, task: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Args:
        batch: ``(x, y)``, or a dict of tensors with the targets under "labels".
        task: the task's name, for the error.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"A batch of '{task}' is a pair (x, y) or a dict with 'labels', found {type(batch).__name__}"
        + (f" of {len(batch)}." if isinstance(batch, (tuple, list)) else ".")
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)


def steps_in(loader: Loader, task: str) -> int:
    """How many batches a loader gives.

    Raises:
        DataError: it gives none, or cannot say.
    """
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(
            f"The training data of '{task}' has no length. Say how many steps make an epoch: "
            "fit(..., steps=100)."
        ) from None
    if steps == 0:
        raise DataError(
            f"The data of '{task}' is empty: the loader gives no batch. Check the data set, and "
            "drop_last with a batch size larger than the data set."
        )
    return steps


def slice_loader(loader: Loader, part: tuple[float, float], seed: int, task: str) -> Loader:
    """The loader over a fixed part of its data set, for phases that train on disjoint parts.

    Args:
        loader: a `DataLoader`.
        part: ``(from, to)`` in shares of the data set, in an order drawn once by the seed.
        seed: draws the order.
        task: the task's name, for the error.
    """
    if part == (0.0, 1.0):
        return loader
    if not isinstance(loader, DataLoader):
        raise DataError(f"The plan splits the training data of '{task}': give a DataLoader.")
    dataset = loader.dataset
    count = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[int(part[0] * count) : int(part[1] * count)]
    return DataLoader(
        Subset(dataset, chosen),
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
    )


def together(loaders: Mapping[str, Loader], steps: int) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Steps that visit every task: shorter loaders start again, so that no data is cut off.

    Args:
        loaders: by task.
        steps: how many steps to give.
    """
    iterators = {task: iter(loader) for task, loader in loaders.items()}
    for _ in range(steps):
        step = {}
        for task, loader in loaders.items():
            try:
                batch = next(iterators[task])
            except StopIteration:
                iterators[task] = iter(loader)
                try:
                    batch = next(iterators[task])
                except StopIteration:
                    raise DataError(f"The training data of '{task}' gave no batch.") from None
            step[task] = split_batch(batch, task)
        yield step
