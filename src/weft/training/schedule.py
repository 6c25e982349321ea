"""The course of a run in numbers: which phase holds in which epoch, and how the rate falls."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

from weft.core.sharing import Phase
from weft.errors import TrainingError

Schedule = Literal["cosine", "constant"]


def phase_of_each_epoch(phases: tuple[Phase, ...], epochs: int, method: str) -> list[Phase]:
    """Lay a plan's phases over the epochs.

    Phases with exact epochs take these; the others divide the rest by their shares.

    Args:
        phases: in order.
        epochs: of the whole run.
        method: the plan's method, for the error.

    Returns:
        The phase of each epoch.

    Raises:
        TrainingError: the exact phases leave too few epochs.
    """
    exact = sum(p.epochs or 0 for p in phases)
    flexible = [p for p in phases if p.epochs is None]
    rest = epochs - exact
    if rest < len(flexible):
        need = exact + len(flexible)
        raise TrainingError(
            f"'{method}' has {len(phases)} phases ({', '.join(p.name for p in phases)}) and needs "
            f"at least {need} epochs, found epochs={epochs}. Train longer, or shorten the phases "
            "by the method's options."
        )
    lengths = divide(rest, [p.share for p in flexible])
    course: list[Phase] = []
    for phase in phases:
        length = lengths.pop(0) if phase.epochs is None else phase.epochs
        course += [phase] * length
    # Only exact phases: what is left belongs to the last one.
    return course + [phases[-1]] * (epochs - len(course))


def divide(total: int, shares: list[float]) -> list[int]:
    """Whole numbers that add up to the total, each at least one, nearest to the shares."""
    if not shares:
        return []
    weight = sum(shares)
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share / weight * total)
    lengths = [max(1, round(bounds[i + 1]) - round(bounds[i])) for i in range(len(shares))]
    while sum(lengths) > total:
        lengths[lengths.index(max(lengths))] -= 1
    lengths[-1] += total - sum(lengths)
    return lengths


def rate_factor(
    schedule: Schedule, stretches: Sequence[int], warmup: int
) -> Callable[[int], float]:
    """The factor on the learning rate at each optimiser step.

    Args:
        schedule: "cosine" falls towards zero, which it would reach one step after the last;
            "constant" stays.
        stretches: optimiser steps of the stretches of the run; each runs through the schedule.
        warmup: steps over which the rate rises linearly to its full value, in each stretch.

    Returns:
        A function of the step, counted from 0.
    """
    ends = list(accumulate(stretches))

    def factor(step: int) -> float:
        place = min(bisect_right(ends, step), len(ends) - 1)
        length = stretches[place]
        step -= ends[place] - length
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, length - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    return factor
