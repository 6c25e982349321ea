"""What a trained task costs to run: memory and time, measured where it is cheap to measure."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.core.model import MultiTaskModel

if sys.platform != "win32":
    import resource

WARMUPS, REPEATS, SECONDS = 2, 15, 2.0
"""Forwards before measuring, forwards measured at most, and seconds after which no more begin."""


def reset_peak_memory(device: torch.device) -> None:
    """Let peaks of memory count from now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory() -> int | None:
    """The largest resident set of this process in bytes, None where the system does not say.

    Since `reset_peak_memory` on Linux, elsewhere since the process began.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took on a CUDA device, None on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def latency(model: MultiTaskModel, task: str, x: Any, device: torch.device) -> float:
    """The time of one forward of a task, in eval mode, without gradients.

    Args:
        model: the model, in eval mode.
        task: its name.
        x: inputs, rows first.
        device: where the model is.

    Returns:
        Milliseconds, the median over some forwards of the whole batch.
    """
    x = pytree.tree_map_only(Tensor, lambda t: t.to(device), x)
    times: list[float] = []
    with torch.no_grad():
        for _ in range(WARMUPS):
            model(x, task=task)
        began = time.perf_counter()
        while len(times) < REPEATS and (not times or time.perf_counter() - began < SECONDS):
            _wait_for(device)
            start = time.perf_counter()
            model(x, task=task)
            _wait_for(device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def bytes_on_disk(folder: Path) -> int:
    """The sizes of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
