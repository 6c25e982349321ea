"""Paired timing: contestants take turns in one process, so that noise of the machine hits all."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata

import torch


def machine() -> str:
    """The machine and the versions, for the head of every table."""
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "weft-share"))
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; "
        f"python {platform.python_version()}, {versions}"
    )


def paired(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order turns by one every round."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contestants[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> str:
    """Median and quartiles of the ratios of the rounds."""
    ratios = sorted(a / b for a, b in zip(seconds[of], seconds[to], strict=True))
    quarter = len(ratios) // 4
    middle = statistics.median(ratios)
    return f"{middle:.3f} (quartiles {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"


def milliseconds(values: list[float]) -> str:
    """Median in milliseconds."""
    return f"{1000 * statistics.median(values):.2f} ms"
