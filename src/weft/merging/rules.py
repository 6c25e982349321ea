"""Rules that make one direction out of several task vectors; each reads them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from .vectors import Vector, precise

Rule = Literal["average", "task_arithmetic", "ties"]
Vectors = Callable[[], Iterator[tuple[str, Vector]]]
"""Gives the vectors of all tasks anew each time that it is called."""


def total(vectors: Vectors) -> tuple[Vector, int]:
    """The sum of the vectors, and how many there are: task arithmetic.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023,
    https://arxiv.org/abs/2212.04089.
    """
    found: Vector = {}
    count = 0
    for _, vector in vectors():
        count += 1
        for name, change in vector.items():
            found[name] = found[name] + change if name in found else change.clone()
    return found, count


def ties(vectors: Vectors, density: float) -> Vector:
    """Trim, elect signs, and average what agrees with them.

    1. Of each task keep the share ``density`` of all its entries that is largest in absolute value,
       over the whole vector; the others are 0. Entries that equal the smallest kept one stay.
    2. The sign of an entry is that of its sum over the tasks.
    3. The result is the mean of the kept entries that have this sign, 0 where there are none.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
    https://arxiv.org/abs/2306.01708, section 3.

    Args:
        vectors: of the tasks.
        density: in (0, 1].

    Returns:
        The direction, in float32 where the vectors are in half precision.

    Differs from the authors' code in that entries whose sum is exactly 0 elect no sign and stay
    the base's; there they take the sign of the majority of all entries.
    """
    sums, _ = total(lambda: ((name, trim(v, density)) for name, v in vectors()))
    agreed = {name: torch.zeros_like(change) for name, change in sums.items()}
    voices = {name: torch.zeros_like(change) for name, change in sums.items()}
    for _, vector in vectors():
        for name, change in trim(vector, density).items():
            same = (change.sign() == sums[name].sign()) & (change != 0)
            agreed[name] += torch.where(same, change, 0.0)
            voices[name] += same
    return {name: agreed[name] / voices[name].clamp(min=1) for name in sums}


def trim(vector: Mapping[str, Tensor], density: float) -> Vector:
    """The vector with all but its largest entries at 0; in float32 if it is in half precision.

    Args:
        vector: of a task.
        density: share of the entries that stays, in (0, 1].
    """
    vector = {name: precise(change) for name, change in vector.items()}
    sizes = torch.cat([change.abs().flatten() for change in vector.values()])
    kept = max(1, round(density * sizes.numel()))
    least = sizes.kthvalue(sizes.numel() - kept + 1).values
    return {n: torch.where(c.abs() >= least, c, 0.0) for n, c in vector.items()}
