"""Targets: what a column or array of targets means."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.data.request import Request

KINDS = ("classes", "number")
IGNORED, VOID = -100, 255


def read_targets(
    request: Request, values: npt.NDArray[Any], name: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Turn an array of targets into class indices or numbers.

    Texts are classes in sorted order. Whole numbers are class indices as they stand, except an
    N x K array, which is K targets a row (numbers, or 0/1 for several labels at once). In maps of
    classes (N x H x W) 255 is the usual mark of unknown pixels and no class, unless larger values
    occur. Floats are numbers. The option ``kind=classes`` or ``kind=number`` overrides this.

    Args:
        request: holds the option ``kind``.
        values: N, N x K or N x H x W values.
        name: what to call the array in an error.

    Returns:
        int64 class indices with class names, or float32 numbers with None.

    Raises:
        DataError: the values do not fit the wanted kind.
    """
    kind = request.choice("kind", KINDS)
    if values.dtype.kind in "US":
        if kind == "number":
            raise request.error(f"{name} holds texts, and kind=number was asked for. Drop kind.")
        names, codes = np.unique(values, return_inverse=True)
        text = names.astype(str)
        return torch.from_numpy(codes.reshape(values.shape)), tuple(text.tolist())
    if values.dtype.kind not in "biuf":
        raise request.error(
            f"{name} has type {values.dtype}; expected texts, whole numbers or floats."
        )
    whole = values.dtype.kind != "f"
    if kind is None:
        kind = "classes" if whole and values.ndim != 2 else "number"
    if kind == "number":
        return torch.from_numpy(values.astype(np.float32)), None
    codes = values.astype(np.int64)
    if not whole and not np.array_equal(codes, values):
        raise request.error(f"{name} holds fractions, and kind=classes was asked for. Drop kind.")
    if codes.size and codes.min() < 0:
        raise request.error(
            f"{name} holds {int(codes.min())}; expected class indices >= 0. Number the classes "
            "from 0, or say kind=number for a regression target."
        )
    targets = torch.from_numpy(codes)
    known = known_labels(targets)
    count = int(known.max()) + 1 if len(known) else 0
    return targets, tuple(str(label) for label in range(count))


def known_labels(targets: Tensor) -> Tensor:
    """The labels that mean a class, in one row.

    Args:
        targets: N ... class indices. In N x T and N x H x W, -100 marks what is unknown, as in
            cross-entropy; in maps 255 does, too, unless larger values occur.

    Returns:
        The labels without these.
    """
    labels = targets.flatten()
    if targets.ndim > 1:
        labels = labels[labels != IGNORED]
    if targets.ndim > 2 and len(labels) and int(labels.max()) == VOID:
        labels = labels[labels != VOID]
    return labels
