"""Splits by a stated seed, and the assembly of a task from rows and splits."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.data.request import Request, listing
from weft.data.sets import SPLITS, ArrayData, Inputs, TaskData, input_tensors
from weft.data.targets import known_labels
from weft.errors import DataError


def stratified_split(targets: Tensor, *, val: float, test: float, seed: int) -> dict[str, Tensor]:
    """Split rows so that every class appears in every split in the stated shares.

    A class of at least 3 samples has one or more in each split, whatever rounding says; one of 2
    has none in the last; a single sample trains. Targets that are not class indices are split at
    random. The split depends on nothing but the arguments: torch's global generator is not read.

    Args:
        targets: N class indices (int64), or any other N x ... targets.
        val: share for validation, 0 <= val < 1.
        test: share for the test split, 0 <= test < 1 - val.
        seed: seed of the permutation.

    Returns:
        Sorted row numbers for "train", "val" and "test"; a share of 0 has no entry.

    Raises:
        DataError: the shares are out of range.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise DataError(
            f"Found shares val={val}, test={test}; expected both >= 0 and a sum below 1."
        )
    generator = torch.Generator().manual_seed(seed)
    by_class = targets.ndim == 1 and not targets.is_floating_point()
    groups = (
        [torch.nonzero(targets == label).flatten() for label in torch.unique(targets)]
        if by_class
        else [torch.arange(len(targets))]
    )
    shares = {name: share for name, share in (("val", val), ("test", test)) if share > 0}
    chosen: dict[str, list[Tensor]] = {name: [] for name in ("train", *shares)}
    for group in groups:
        left = group[torch.randperm(len(group), generator=generator)]
        for name, share in shares.items():
            # One sample stays for training, and the wish of one per split yields to it.
            count = min(max(1, round(len(group) * share)), len(left) - 1)
            chosen[name].append(left[:count])
            left = left[count:]
        chosen["train"].append(left)
    return {name: torch.cat(parts).sort().values for name, parts in chosen.items()}


def complete_splits(
    rows: dict[str, Tensor] | None, targets: Tensor, request: Request
) -> dict[str, Tensor]:
    """Fill in the splits that the data does not fix.

    Without any fixed split all rows are split. Where "train" is fixed and "val" is not, validation
    is taken out of the training rows: the test split never selects a model. A fixed split is never
    moved, and a missing test split stays missing.

    Args:
        rows: row numbers of the fixed splits by name, or None.
        targets: the targets of all rows.
        request: shares and seed.

    Returns:
        Row numbers by split name.

    Raises:
        DataError: the shares are out of range.
    """
    if rows is None:
        return stratified_split(targets, val=request.val, test=request.test, seed=request.seed)
    if "train" not in rows or "val" in rows:
        return rows
    train = rows["train"]
    parts = stratified_split(targets[train], val=request.val, test=0, seed=request.seed)
    return {**rows, **{name: train[part] for name, part in parts.items()}}


def assemble(
    request: Request,
    inputs: Inputs,
    targets: Tensor,
    rows: dict[str, Tensor],
    classes: tuple[str, ...] | None,
) -> TaskData:
    """Make the data of a task out of all its rows.

    Args:
        request: what was asked for.
        inputs: all rows of all splits.
        targets: as many targets; class indices lie in 0..len(classes)-1 where they are known.
        rows: row numbers by split name.
        classes: the class names, None for numeric targets.

    Returns:
        The data of the task; the splits share one storage.

    Raises:
        DataError: there are no rows at all, or a label has no class.
    """
    if not len(targets):
        raise request.error("found no samples; expected at least one. Give data that has rows.")
    if classes is not None:
        labels = known_labels(targets)
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise request.error(
                f"found label {int(outside[0])} ({len(outside)} such "
                f"labels); expected 0..{len(classes) - 1}, for {len(classes)} class names "
                f"({listing(classes, 5)}). Correct the labels or name every class."
            )
    tensors = input_tensors(inputs)
    sets = {name: ArrayData(inputs, targets, rows[name]) for name in SPLITS if name in rows}
    return TaskData(
        train=sets.get("train"),
        val=sets.get("val"),
        test=sets.get("test"),
        classes=classes,
        input_shape=tuple(tensors[0].shape[1:]) if len(tensors) == 1 else None,
        source=request.spec,
    )
