"""How alike tasks are in what they own: which layers they changed, and in which direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft.errors import DataError


@dataclass(frozen=True)
class Similarity:
    """The similarity of every two tasks.

    Args:
        tasks: names, in the order of the changes that were given.
        values: by row and column, in [-1, 1]; 1 on the diagonal of tasks that changed something,
            0 for those that changed nothing.
        order: places of the tasks such that similar ones stand beside each other.
    """

    tasks: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]


def similarity(changes: Mapping[str, Mapping[str, Tensor]]) -> Similarity:
    """The cosine between what tasks changed, each layer scaled to count for its share.

    With d_ti the change of task t in tensor i, relative to the size of that tensor in the base,
    ``s_tu = sum_i <d_ti, d_ui> / (|d_t| |d_u|)``, where ``|d_t|^2 = sum_i |d_ti|^2``. A tensor that
    a task does not own is not changed: d_ti = 0. So 1 means the same layers changed in the same
    direction, 0 other layers or unrelated directions, -1 opposite ones.

    Args:
        changes: by task, by tensor, the change over the norm of the base's tensor; of one shape
            for all tasks.

    Returns:
        The values, and an order in which similar tasks are neighbours.

    Raises:
        DataError: two tasks changed a tensor of different shapes.
    """
    tasks = tuple(changes)
    gram = np.zeros((len(tasks), len(tasks)))
    names = dict.fromkeys(name for own in changes.values() for name in own)
    for name in names:
        places = [i for i, task in enumerate(tasks) if name in changes[task]]
        found = [changes[tasks[i]][name].detach().flatten().double() for i in places]
        if len({change.shape for change in found}) > 1:
            raise DataError(f"Tasks changed '{name}' in different shapes; they have other bases.")
        stacked = torch.stack(found)
        gram[np.ix_(places, places)] += (stacked @ stacked.T).cpu().numpy()
    length = np.sqrt(np.diag(gram))
    scale = np.where(length > 0, length, 1.0)
    values = np.clip(gram / np.outer(scale, scale), -1.0, 1.0)
    rows = tuple(tuple(float(v) for v in row) for row in values)
    return Similarity(tasks, rows, _ordered(values))


def relative_change(used: Tensor, base: Tensor) -> Tensor:
    """What a task changed in a tensor, over the norm of the base's tensor (1 where that is 0)."""
    size = float(base.detach().double().norm()) or 1.0
    return (used.detach().double() - base.detach().double()) / size


def _ordered(values: NDArray[np.float64]) -> tuple[int, ...]:
    """Leaves of average linkage over 1 - similarity, turned so that neighbours are most alike."""
    count = len(values)
    if count < 3:
        return tuple(range(count))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1.0 - (values + values.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tuple(int(i) for i in leaves_list(tree))


def strongest(found: Similarity, count: int) -> list[tuple[str, str, float]]:
    """The pairs of different tasks that are most alike, the most alike first."""
    pairs = [
        (a, b, found.values[i][j])
        for i, a in enumerate(found.tasks)
        for j, b in enumerate(found.tasks[:i])
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def reordered(found: Similarity) -> Similarity:
    """The same with its tasks in the order in which similar ones are neighbours."""
    order: Sequence[int] = found.order
    return Similarity(
        tuple(found.tasks[i] for i in order),
        tuple(tuple(found.values[i][j] for j in order) for i in order),
        tuple(range(len(order))),
    )
