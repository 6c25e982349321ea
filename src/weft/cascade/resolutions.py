"""One task at several input sizes: a task, and so a patch, for each size.

Mudrakarta, Sandler, Zhmoginov, Howard, "K for the Price of 1", ICLR 2019: domains that are the
resolutions of one data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.task import Task, check_task_name
from weft.data.transforms import resize
from weft.errors import DataError, TaskError
from weft.training.batches import Changed, Loader, split_batch

Stage = tuple[str, int]
"""A task and the side of the square images that it takes."""


def add_resolutions(
    model: MultiTaskModel, name: str, task: Task, sizes: Sequence[int], *, shared_head: bool = False
) -> list[Stage]:
    """Add one task for each input size; the model's plan gives each of them its patch.

    Args:
        model: the model, with a base that takes images of any size.
        name: the tasks are called ``name@size``.
        task: head, loss and metric, the same for all.
        sizes: sides of the square images, ascending.
        shared_head: whether the base ends in the head already, for all sizes together; the tasks
            then have no head of their own.

    Returns:
        Names and sizes, in order.

    Raises:
        TaskError: sizes that do not ascend, or a name that is taken.
    """
    if not sizes or list(sizes) != sorted(set(sizes)) or min(sizes) < 1:
        raise TaskError(f"sizes ascend and are at least 1, found {list(sizes)}.")
    stages = [(f"{name}@{size}", size) for size in sizes]
    for each, _ in stages:
        check_task_name(each, model.tasks)
    for each, _ in stages:
        model.add_task(each, replace(task, head=None) if shared_head else task)
    return stages


@final
class Resized(Changed):
    """The batches of a loader with images of another size.

    Args:
        loader: batches ``(x, y)`` with images N x C x H x W of floats.
        size: side of the result; of each image the largest centred square is used.
    """

    def __init__(self, loader: Loader, size: int) -> None:
        self._loader = loader
        self.size = size

    @property
    def loader(self) -> Loader:
        """The loader that is read."""
        return self._loader

    def over(self, loader: Loader) -> Resized:
        """The same size for the batches of another loader."""
        return Resized(loader, self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in self._loader:
            x, y = split_batch(batch, "images to resize")
            yield resized(x, self.size), y


def resized(images: Any, size: int) -> Tensor:
    """A batch of images in another size.

    Raises:
        DataError: these are no images.
    """
    return resize(checked_images(images), size)


def checked_images(images: Any) -> Tensor:
    """The images, if they are some.

    Raises:
        DataError: these are no images.
    """
    if isinstance(images, Tensor) and images.dim() == 4 and images.is_floating_point():
        return images
    found = type(images).__name__
    if isinstance(images, Tensor):
        found = f"{images.dtype} of shape {tuple(images.shape)}"
    raise DataError(f"Images of several sizes are floats N x C x H x W, found {found}.")
