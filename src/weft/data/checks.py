"""What is worth knowing about data before hours of training are spent on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from weft.data.loading import stack_samples
from weft.data.request import listing
from weft.data.sets import ArrayData, Inputs, TaskData, input_tensors, size
from weft.data.targets import known_labels

_ROWS_AT_ONCE = 512


def check(data: TaskData) -> list[str]:
    """Look for what makes training fail or its scores worthless; reads every sample once.

    Args:
        data: the splits of a task.

    Returns:
        One sentence for each problem, in the order of the splits: splits that are missing or
        empty, inputs or targets that are not finite, labels outside the classes, classes without
        a sample, and inputs that occur in two splits. An empty list means that none was found.

    Raises:
        DataError: a split is not map-style, or its samples cannot be stacked.
    """
    problems: list[str] = []
    if data.train is None:
        problems.append("There is no train split: this data can only be evaluated.")
    elif data.val is None:
        problems.append(
            "There is no val split, and the test split must not select a model: split some "
            "training rows off."
        )
    seen: dict[str, dict[bytes, int]] = {}
    for name, split in data.splits.items():
        if not size(split):
            problems.append(f"The {name} split is empty.")
            continue
        hashes, targets, broken = _read(split)
        if broken:
            problems.append(
                f"{len(broken)} of {size(split)} inputs of {name} hold NaN or infinity (samples "
                f"{listing(map(str, broken), 5)})."
            )
        problems += _targets(name, targets, data.classes)
        problems += _repeats(name, hashes, seen)
        # The first place of each input: setdefault keeps it where a split repeats itself.
        own = seen.setdefault(name, {})
        for place, digest in enumerate(hashes):
            own.setdefault(digest, place)
    return problems


def _batches(split: Dataset[Any]) -> Iterator[tuple[Inputs, Tensor]]:
    # Not a DataLoader: even an ordered one draws from torch's global generator.
    for start in range(0, size(split), _ROWS_AT_ONCE):
        places = list(range(start, min(start + _ROWS_AT_ONCE, size(split))))
        if isinstance(split, ArrayData):
            yield stack_samples(split.__getitems__(places))
        else:
            yield stack_samples([split[place] for place in places])


def _read(split: Dataset[Any]) -> tuple[list[bytes], Tensor, list[int]]:
    """Digests of the inputs, all targets, and the places of inputs that are not finite."""
    hashes: list[bytes] = []
    targets: list[Tensor] = []
    broken: list[int] = []
    for inputs, batch_targets in _batches(split):
        count = len(batch_targets)
        bad = torch.zeros(count, dtype=torch.bool)
        digests = [hashlib.blake2b(digest_size=16) for _ in range(count)]
        for tensor in input_tensors(inputs):
            flat = tensor.reshape(count, -1)
            if flat.is_floating_point():
                bad |= ~flat.isfinite().all(dim=1)
            for digest, row in zip(digests, np.ascontiguousarray(flat.numpy()), strict=True):
                digest.update(row.data)
        broken += (torch.nonzero(bad).flatten() + len(hashes)).tolist()
        hashes += [digest.digest() for digest in digests]
        targets.append(batch_targets)
    return hashes, torch.cat(targets), broken


def _targets(name: str, targets: Tensor, classes: tuple[str, ...] | None) -> list[str]:
    if targets.is_floating_point():
        bad = int((~targets.isfinite()).sum())
        return [f"{bad} targets of {name} are NaN or infinite."] if bad else []
    if classes is None:
        return []
    problems: list[str] = []
    used = known_labels(targets)
    outside = (used < 0) | (used >= len(classes))
    if outside.any():
        values = [str(v) for v in torch.unique(used[outside]).tolist()]
        problems.append(
            f"{int(outside.sum())} labels of {name} are outside 0..{len(classes) - 1}: "
            f"{listing(values, 5)}."
        )
    counts = torch.bincount(used[~outside].long(), minlength=len(classes)).tolist()
    empty = [label for label, count in zip(classes, counts, strict=True) if not count]
    if empty:
        problems.append(
            f"{len(empty)} of {len(classes)} classes have no sample in {name}: {listing(empty)}."
        )
    return problems


def _repeats(name: str, hashes: list[bytes], seen: dict[str, dict[bytes, int]]) -> list[str]:
    problems = []
    for other, known in seen.items():
        places = [place for place, digest in enumerate(hashes) if digest in known]
        if places:
            pairs = [f"{place} = {known[hashes[place]]}" for place in places]
            problems.append(
                f"{len(places)} of {len(hashes)} inputs of {name} also occur in {other} (samples "
                f"of {name} = {other}: {listing(pairs, 3)})."
            )
    return problems
