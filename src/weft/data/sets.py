"""Data sets held as whole tensors, and the splits of one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Sized as SizedABC
from dataclasses import dataclass
from typing import Any, TypeAlias, final, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from weft.errors import DataError

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"

SPLITS = ("train", "val", "test")


def map_inputs(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor of an input structure.

    Args:
        inputs: a tensor, or a tuple or dict of tensors.
        change: what to do to each tensor.

    Returns:
        The same structure with the changed tensors.
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(change(value) for value in inputs)


def input_tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors of an input structure, in order.

    Args:
        inputs: a tensor, or a tuple or dict of tensors.

    Returns:
        The tensors, rows first.
    """
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


@final
class Batch(Sequence[tuple[Inputs, Tensor]]):
    """Rows gathered in one indexing operation that still read as a list of ``(x, y)`` pairs.

    A ``DataLoader`` hands the result of ``__getitems__`` to its collate function. Our own takes
    the tensors as they are; any other (``default_collate`` included) sees a sequence of samples.

    Args:
        inputs: the input tensors, rows first.
        targets: the targets, as many rows.
    """

    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    @overload
    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> tuple[Inputs, Tensor] | Batch:
        if isinstance(index, slice):
            return Batch(map_inputs(self.inputs, lambda t: t[index]), self.targets[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a batch of {len(self)}")
        return map_inputs(self.inputs, lambda t: t[index]), self.targets[index]


@final
class ArrayData(Dataset[tuple[Inputs, Tensor]]):
    """A map-style data set over tensors in memory, of which several splits may share one storage.

    Args:
        inputs: a tensor, or a tuple or dict of tensors, rows first; images are N x C x H x W,
            as uint8 or as floats in 0..1.
        targets: N class indices (int64), or N x ... numbers (float32), or N x H x W class
            indices for dense prediction.
        rows: int64 row numbers that belong to this split; all rows when None.

    Raises:
        DataError: the tensors differ in their number of rows.
    """

    def __init__(self, inputs: Inputs, targets: Tensor, rows: Tensor | None = None) -> None:
        lengths = [len(tensor) for tensor in input_tensors(inputs)]
        if any(length != len(targets) for length in lengths):
            raise DataError(
                f"Inputs have {', '.join(map(str, lengths))} rows and targets {len(targets)}; "
                "expected one target for each input row."
            )
        self.inputs = inputs
        self.targets = targets
        self.rows = torch.arange(len(targets)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        row = int(self.rows[index])
        return map_inputs(self.inputs, lambda t: t[row]), self.targets[row]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather many rows at once.

        Args:
            indices: positions in 0..len-1.

        Returns:
            The rows as a batch.
        """
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return Batch(map_inputs(self.inputs, lambda t: t[rows]), self.targets[rows])

    @property
    def labels(self) -> Tensor:
        """The targets of this split, in order."""
        return self.targets[self.rows]


@final
@dataclass(frozen=True)
class TaskData:
    """The splits of one task.

    Args:
        train: map-style data set of ``(x, y)`` samples, or None.
        val: the split that model selection uses, or None.
        test: the split that is only reported, or None.
        classes: class names in the order of their labels; None for numeric targets, or unknown.
        input_shape: shape of one input without the row dimension, where the input is one tensor.
        source: the data spec this came from.
    """

    train: Dataset[Any] | None
    val: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    classes: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    source: str = ""

    @property
    def splits(self) -> dict[str, Dataset[Any]]:
        """The splits that exist, by name, in the order train, val, test."""
        named = zip(SPLITS, (self.train, self.val, self.test), strict=True)
        return {name: split for name, split in named if split is not None}

    def describe(self) -> str:
        """One line for people: sizes, input shape, classes.

        Returns:
            For instance ``"2554 train, 393 val, 982 test; 3x96x96; 7 classes"``.
        """
        sizes = ", ".join(f"{size(split)} {name}" for name, split in self.splits.items())
        shape = "" if self.input_shape is None else "; " + "x".join(map(str, self.input_shape))
        kind = "no class names" if self.classes is None else f"{len(self.classes)} classes"
        return f"{sizes}{shape}; {kind}"


def size(dataset: Dataset[Any]) -> int:
    """Number of samples of a map-style data set.

    Args:
        dataset: the data set.

    Returns:
        Its length.

    Raises:
        DataError: it has no length, so it cannot be shuffled, split or checked.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, SizedABC):
        raise DataError(
            f"{type(dataset).__name__} is not a map-style data set: expected __len__ and "
            "__getitem__. Read it into one first, for instance weft.data.ArrayData."
        )
    return len(dataset)
