"""Loaders: checked before training, cut into parts, divided between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from weft.errors import DataError

from .batches import Changed, Loader, ManyTargets, TargetsOf, TaskData, sources


def data_by_task(
    data: Mapping[str, TaskData] | TaskData, tasks: tuple[str, ...]
) -> Mapping[str, TaskData]:
    """Data to train on by task, however it is given.

    Args:
        data: training batches or a pair (train, val), by task; or one of these for all tasks, with
            batches ``(x, {task: y})``.
        tasks: all tasks of the model.

    Returns:
        By task, training batches or a pair.

    Raises:
        DataError: a tuple that is no pair.
    """
    if isinstance(data, Mapping):
        return data
    if not isinstance(data, tuple):
        return _of_each(data, tasks)
    if len(data) != 2:
        raise DataError(
            f"The data is training batches or a pair (train, val), found a tuple of {len(data)}."
        )
    train, val = data
    if val is None:
        return _of_each(train, tasks)
    validation = _of_each(val, tasks)
    return {task: (loader, validation[task]) for task, loader in _of_each(train, tasks).items()}


def loaders_by_task(
    data: Mapping[str, Loader] | Loader, tasks: tuple[str, ...]
) -> Mapping[str, Loader]:
    """Batches by task, however they are given.

    Args:
        data: batches by task, or batches ``(x, {task: y})`` for all tasks.
        tasks: all tasks of the model.

    Returns:
        By task, batches ``(x, y)``.

    Raises:
        DataError: no loader, or several where one is expected.
    """
    if isinstance(data, Mapping):
        return data
    if isinstance(data, tuple) or not isinstance(data, Iterable):
        found = type(data).__name__
        raise DataError(f"Expected one loader, or a dict with one for each task, found {found}.")
    return _of_each(data, tasks)


def _of_each(loader: Loader, tasks: tuple[str, ...]) -> dict[str, Loader]:
    many = ManyTargets(loader, tasks)
    return {task: TargetsOf(many, task) for task in tasks}


def check_loader(loader: Loader, task: str, *, exact: bool) -> None:
    """Refuse data that cannot be read again each epoch.

    Args:
        loader: the batches.
        task: the task's name, for errors.
        exact: whether a second reading with the same seed must give the same batches.

    Raises:
        DataError: says what is wrong and what to do.
    """
    loader = _read(loader)
    if not isinstance(loader, Iterable):
        raise DataError(
            f"The data of '{task}' is batches, for instance a DataLoader; found "
            f"{type(loader).__name__}."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            f"The data of '{task}' is an iterator, which can be read only once, but every epoch "
            "reads it anew. Give a DataLoader, a list of batches, or an object with __iter__."
        )
    if _length(loader) == 0:
        raise DataError(
            f"The data of '{task}' is empty: the loader gives no batch. Check the data set, and "
            "drop_last with a batch size larger than the data set."
        )
    if exact and isinstance(loader, DataLoader) and loader.persistent_workers:
        raise DataError(
            f"The loader of '{task}' keeps its workers, and with them their random numbers, from "
            "epoch to epoch, so a run could not go on from a checkpoint to the same result. Make "
            "it with persistent_workers=False."
        )


def check_readers(loaders: Mapping[str, Loader]) -> None:
    """Refuse loaders that cannot be read for several tasks at a time.

    Args:
        loaders: by task.

    Raises:
        DataError: a loader whose workers persist is that of two tasks.
    """
    read: dict[int, str] = {}
    for source in sources(loaders):
        loader, task = _read(source.loader), source.tasks[0]
        first = read.setdefault(id(loader), task)
        if first != task and isinstance(loader, DataLoader) and loader.persistent_workers:
            raise DataError(
                f"'{first}' and '{task}' read one loader at a time, which a loader that keeps its "
                "workers cannot serve: each would get a part of the batches. Make it with "
                "persistent_workers=False, or one for each task."
            )


def steps_in(loader: Loader, task: str) -> int:
    """How many batches a loader gives.

    Args:
        loader: the batches.
        task: the task's name, for errors.

    Returns:
        The number.

    Raises:
        DataError: it cannot say.
    """
    steps = _length(loader)
    if steps is None:
        raise DataError(
            f"The training data of '{task}' has no length. Say how many steps make an epoch: "
            "fit(..., steps=100)."
        )
    return steps


def _read(loader: Loader) -> Loader:
    """What is read for a loader, inside of what only changes its batches."""
    if isinstance(loader, TargetsOf):
        return _read(loader.many.loader)
    return _read(loader.loader) if isinstance(loader, Changed) else loader


def _length(loader: Loader) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def slice_loader(loader: Loader, part: tuple[float, float], seed: int, task: str) -> Loader:
    """The loader over a fixed part of its data set, for phases that train on disjoint parts.

    Args:
        loader: a `DataLoader` that shuffles or keeps the order.
        part: ``(from, to)`` in shares of the data set, in an order drawn once by the seed.
        seed: draws the order.
        task: the task's name, for errors.

    Returns:
        A loader that is otherwise the same.

    Raises:
        DataError: the data cannot be cut, or the part is empty.
    """
    if part == (0.0, 1.0):
        return loader
    if isinstance(loader, TargetsOf):
        many = loader.many.changed(
            ("part", part, seed), lambda batches: slice_loader(batches, part, seed, task)
        )
        return TargetsOf(many, loader.task)
    if isinstance(loader, Changed):
        return loader.over(slice_loader(loader.loader, part, seed, task))
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_size is None
        or type(loader.sampler) not in (RandomSampler, SequentialSampler)
    ):
        raise DataError(
            f"The plan splits the training data of '{task}', which needs a DataLoader over a "
            "map-style data set, with a batch size and without a sampler of its own."
        )
    dataset = loader.dataset
    count = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[int(part[0] * count) : int(part[1] * count)]
    if not chosen or (loader.drop_last and len(chosen) < loader.batch_size):
        raise DataError(
            f"The plan trains '{task}' on the part {part[0]}..{part[1]} of its {count} samples, "
            "which is not even one batch. Give more data or smaller batches."
        )
    subset: Subset[Any] = Subset(dataset, chosen)
    sampler: Sampler[int] = SequentialSampler(subset)
    if isinstance(loader.sampler, RandomSampler):
        sampler = RandomSampler(subset, generator=loader.sampler.generator)
    return _with_batches(loader, subset, BatchSampler(sampler, loader.batch_size, loader.drop_last))


def _with_batches(
    loader: DataLoader[Any], dataset: Dataset[Any], batches: Iterable[list[int]]
) -> DataLoader[Any]:
    """A loader of other batches that is otherwise the same, but for workers that persist.

    Args:
        loader: the loader.
        dataset: its data set, or a part of it.
        batches: places in the data set, batch by batch.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        generator=loader.generator,
    )


def share_of_process(loader: Loader, index: int, count: int, task: str) -> Loader:
    """The loader of one process of several: its share of the rows of every batch.

    Args:
        loader: a `DataLoader` over a map-style data set.
        index: of the process.
        count: of processes.
        task: the task's name, for errors.

    Returns:
        A loader with as many batches.

    Raises:
        DataError: the data cannot be divided.
    """
    if count == 1:
        return loader
    if isinstance(loader, TargetsOf):
        many = loader.many.changed(
            ("share", index, count), lambda batches: share_of_process(batches, index, count, task)
        )
        return TargetsOf(many, loader.task)
    if isinstance(loader, Changed):
        return loader.over(share_of_process(loader.loader, index, count, task))
    rows = _rows_in_batch(loader)
    if not isinstance(loader, DataLoader) or rows is None or rows % count:
        found = type(loader).__name__
        if isinstance(loader, DataLoader):
            found += f" with batch_size={rows}"
        raise DataError(
            f"{count} processes divide every batch of '{task}' between them: give a DataLoader "
            f"over a map-style data set whose batch size is a multiple of {count}, found {found}."
        )
    shard = BatchSamplerShard(loader.batch_sampler, count, index, split_batches=True)
    return _with_batches(loader, loader.dataset, shard)


def _rows_in_batch(loader: Loader) -> int | None:
    """The rows of a full batch of a loader over a map-style data set, where it says so."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    return batches.batch_size if type(batches) is BatchSampler else None


def reseed(loader: Loader, seed: int) -> None:
    """Seed the generators that a loader has of its own."""
    loader = _read(loader)
    if not isinstance(loader, DataLoader):
        return
    batches = loader.batch_sampler
    samplers: list[object] = [loader.sampler]
    samplers += [batches.sampler] if type(batches) is BatchSampler else []
    owners = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    for generator in (loader.generator, *(s.generator for s in samplers if isinstance(s, owners))):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
