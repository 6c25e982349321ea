"""Loaders: shuffled or ordered batches, ready for the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from weft.data.sets import Batch, Inputs, map_inputs, size
from weft.data.transforms import Augmentation, Preprocessing
from weft.errors import DataError

Loader: TypeAlias = "DataLoader[tuple[Inputs, Tensor]]"


def stack_samples(samples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Tensor]:
    """Make one batch of samples.

    Args:
        samples: a ``Batch``, or ``(x, y)`` pairs of a data set.

    Returns:
        Inputs and targets, rows first, types as stored.

    Raises:
        DataError: samples are no pairs, or differ in shape or kind.
    """
    if isinstance(samples, Batch):
        return samples.inputs, samples.targets
    try:
        inputs, targets = default_collate(list(samples))
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"Samples cannot be stacked into a batch: {error}. Expected pairs (x, y) whose tensors "
            "have one shape. Resize or pad them in the data set."
        ) from error
    if isinstance(inputs, Mapping):
        structure: Inputs = dict(inputs)
    else:
        structure = inputs if isinstance(inputs, Tensor) else tuple(inputs)
    if not isinstance(targets, Tensor):
        raise DataError(
            f"Targets came as {type(targets).__name__}; expected a number or a tensor a sample."
        )
    return structure, targets


@final
class Collate:
    """Turns gathered samples into a batch that a network takes.

    Args:
        augmentation: random changes to images, or None.
        preprocessing: normalisation of images, or None to scale pixels to 0..1.
    """

    def __init__(
        self, augmentation: Augmentation | None, preprocessing: Preprocessing | None
    ) -> None:
        self.augmentation = augmentation
        self.preprocessing = preprocessing

    def __call__(self, samples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Tensor]:
        """Make a batch.

        Args:
            samples: what the data set gave for a list of indices.

        Returns:
            Inputs (float32; whole numbers other than pixels stay int64, for embeddings) and
            targets (int64 for classes, float32 for numbers).
        """
        inputs, targets = stack_samples(samples)
        if self.augmentation is not None:
            inputs, targets = self.augmentation(_only_images(inputs, "Augmentation"), targets)
        if self.preprocessing is not None:
            inputs = self.preprocessing(_only_images(inputs, "Preprocessing"))
        return map_inputs(inputs, _network_type), _target_type(targets)


def _only_images(inputs: Inputs, what: str) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    raise DataError(
        f"{what} was given a {type(inputs).__name__} of inputs; expected one tensor of images. "
        "Leave it out and prepare such inputs in the data set."
    )


def _network_type(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(255)
    return (
        tensor.float()
        if tensor.is_floating_point() or tensor.dtype == torch.bool
        else tensor.long()
    )


def _target_type(targets: Tensor) -> Tensor:
    return targets.float() if targets.is_floating_point() else targets.long()


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    train: bool,
    augmentation: Augmentation | None = None,
    preprocessing: Preprocessing | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> Loader:
    """A loader of ``(x, y)`` batches; reseeding torch repeats an epoch, batch for batch.

    Args:
        dataset: a map-style data set.
        batch_size: rows in a batch, >= 1.
        train: shuffle, and allow augmentation; else the order of the data set.
        augmentation: random changes to the images; only with ``train``.
        preprocessing: normalisation of the images; None scales pixels to 0..1.
        workers: processes that prepare batches. 0 is fastest for data in memory.
        drop_last: leave out a last batch that is not full.

    Returns:
        The loader: x float32 (token indices int64), y int64 or float32.

    Raises:
        DataError: the data set is empty or not map-style, no batch would be left, or an argument
            is out of range.
    """
    count = size(dataset)
    if batch_size < 1 or workers < 0:
        raise DataError(
            f"Found batch_size={batch_size}, workers={workers}; expected batch_size >= 1 and "
            "workers >= 0."
        )
    if count == 0:
        raise DataError("The data set is empty; expected at least one sample. Check its split.")
    if drop_last and count < batch_size:
        raise DataError(
            f"The data set has {count} samples, fewer than batch_size={batch_size}, and drop_last "
            "leaves no batch. Lower batch_size or give drop_last=False."
        )
    if augmentation is not None and not train:
        raise DataError("augmentation was given with train=False. Evaluate on unchanged images.")
    # Workers that persist would keep their generators from epoch to epoch, whatever the seed.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        num_workers=workers,
        collate_fn=Collate(augmentation, preprocessing),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )
