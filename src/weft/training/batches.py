"""Batches: how they are read, and how a step gets one of every task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch.utils import _pytree as pytree

from weft.errors import DataError, close_matches

from .randomness import Streams

Loader = Iterable[Any]
"""Batches: pairs (x, y), or dicts with the target under "labels"."""

TaskData = Loader | tuple[Loader, Loader | None]
"""Training batches, alone or with validation batches."""

Batches = dict[str, tuple[Any, Any]]
"""By task, inputs and targets."""


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
    """The batch with all its tensors on the device; one that occurs twice is moved once."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device, non_blocking=True)
        return moved[id(tensor)]

    return pytree.tree_map_only(torch.Tensor, move, batch)


# ------------------------------------------------------------------- one input, many targets


@final
class ManyTargets:
    """Batches ``(x, {task: y})``: one input, with a target for each of several tasks.

    Args:
        loader: the batches.
        tasks: those that have a target in every batch.
    """

    def __init__(self, loader: Loader, tasks: tuple[str, ...]) -> None:
        self.loader = loader
        self.tasks = tasks
        self._changed: dict[Hashable, ManyTargets] = {}

    def split(self, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        """Inputs and the targets of every task.

        Raises:
            DataError: targets that are no dict by task, are missing, or of an unknown task.
        """
        x, targets = split_batch(batch, "', '".join(self.tasks))
        if not isinstance(targets, Mapping):
            raise DataError(
                "One loader for several tasks gives batches (x, {task: y}), found targets of type "
                f"{type(targets).__name__}. Give a loader per task, {{task: loader}}, or targets "
                f"for {', '.join(self.tasks)}."
            )
        for task in self.tasks:
            if task not in targets:
                raise DataError(
                    f"A batch has no targets for '{task}'; found {', '.join(map(repr, targets))}. "
                    "Every batch of one loader for several tasks has targets for all of them."
                    + close_matches(task, map(str, targets))
                )
        for task in targets:
            if task not in self.tasks:
                raise DataError(
                    f"A batch has targets for '{task}', which is no task of the model: "
                    f"{', '.join(self.tasks)}. Add the task, or leave its targets out."
                    + close_matches(str(task), self.tasks)
                )
        return x, targets

    def changed(self, how: Hashable, change: Callable[[Loader], Loader]) -> ManyTargets:
        """The same with another loader, the same object each time, so that tasks stay together.

        Args:
            how: says what is changed.
            change: does it.
        """
        if how not in self._changed:
            self._changed[how] = ManyTargets(change(self.loader), self.tasks)
        return self._changed[how]


class Changed(ABC):
    """The batches of another loader, each changed."""

    @property
    @abstractmethod
    def loader(self) -> Loader:
        """The loader that is read."""

    @abstractmethod
    def over(self, loader: Loader) -> Loader:
        """The same change to the batches of another loader."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


@final
class TargetsOf:
    """One task's batches ``(x, y)`` among those of several.

    Args:
        many: the batches.
        task: the task.
    """

    def __init__(self, many: ManyTargets, task: str) -> None:
        self.many = many
        self.task = task

    def __len__(self) -> int:
        return len(self.many.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.many.loader:
            x, targets = self.many.split(batch)
            yield x, targets[self.task]


# ------------------------------------------------------------------------------------ sources


@final
class Source:
    """What is read at once: the batches of one task, or of several that have their input in common.

    Args:
        loader: the batches.
        tasks: whose they are.
        many: how the targets of several tasks are found; None for one task's own batches.
    """

    def __init__(self, loader: Loader, tasks: list[str], many: ManyTargets | None = None) -> None:
        self.tasks = tasks
        self.loader = loader
        self._many = many

    @property
    def key(self) -> Hashable:
        """Equal for what reads on where the other was left."""
        return (id(self.loader), self.tasks[0]) if self._many is None else id(self._many)

    def split(self, batch: Any) -> Batches:
        """By task, inputs and targets of a batch."""
        if self._many is None:
            return {self.tasks[0]: split_batch(batch, self.tasks[0])}
        x, targets = self._many.split(batch)
        return {task: (x, targets[task]) for task in self.tasks}

    def __iter__(self) -> Iterator[Batches]:
        for batch in self.loader:
            yield self.split(batch)


def sources(loaders: Mapping[str, Loader]) -> list[Source]:
    """The loaders of several tasks as what is read at once."""
    found: dict[Hashable, Source] = {}
    for task, loader in loaders.items():
        if not isinstance(loader, TargetsOf):
            found[task] = Source(loader, [task])
        elif id(loader.many) in found:
            found[id(loader.many)].tasks.append(task)
        else:
            found[id(loader.many)] = Source(loader.many.loader, [task], loader.many)
    return list(found.values())


class Endless:
    """Batches without end: the source starts again when it is exhausted.

    Args:
        source: the batches of one pass.
        streams: what the loader draws comes from its first task's own, so that a task sees the same
            batches alone and together with others.
    """

    def __init__(self, source: Source, streams: Streams) -> None:
        self._source = source
        self._streams = streams
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """The next batch, as the loader gives it.

        Raises:
            DataError: a whole pass gave no batch.
        """
        with self._streams.of(self._source.tasks[0]):
            for _ in range(2):
                if self._iterator is None:
                    self._iterator = iter(self._source.loader)
                batch = next(self._iterator, None)
                if batch is not None:
                    return batch
                self._iterator = None
        raise DataError(f"The training data of '{', '.join(self._source.tasks)}' gave no batch.")


class Reader:
    """The batches of an epoch: a loader that is asked for again goes on where it was left.

    Args:
        seeds: by task, of the random numbers of its data.
    """

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self._streams = Streams(seeds)
        self._open: dict[Hashable, Endless] = {}

    def together(self, loaders: Mapping[str, Loader], steps: int) -> Iterator[Batches]:
        """Steps that visit every task: shorter loaders start again, so that no data is cut off.

        Args:
            loaders: by task.
            steps: how many steps to give.

        Returns:
            ``{task: (inputs, targets)}`` for each step, tasks in the order of the loaders.
        """
        read = [
            (source, self._open.setdefault(source.key, Endless(source, self._streams)))
            for source in sources(loaders)
        ]
        for _ in range(steps):
            step: Batches = {}
            for source, endless in read:
                step |= source.split(endless.next())
            yield {task: step[task] for task in loaders}


def inputs_are_finite(inputs: Any) -> bool:
    """Whether no number of the inputs is NaN or infinite."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
