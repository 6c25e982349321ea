"""Cells of an experiment in parallel processes, each finished cell a file that is never made again.

Cells run with one thread each, which is faster on few cores than one cell with all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import weft

Cell = tuple[Any, ...]


def arguments(description: str | None, out: Path) -> argparse.ArgumentParser:
    """Where the data is, where results go, and how many processes work."""
    parser = argparse.ArgumentParser(description=description)
    known = os.environ.get("WEFT_DATA")
    parser.add_argument("--data", type=Path, default=known, required=known is None)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--jobs", type=int, default=2)
    return parser


def run(work: Callable[..., dict[str, Any]], cells: Iterable[Cell], out: Path, jobs: int) -> None:
    """Run all cells whose file is not there yet.

    Args:
        work: function of a cell's parts to its result, plain values.
        cells: what to run, in this order; a cell's file is named by its parts.
        out: the folder for the files.
        jobs: how many processes.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not _file(out, cell).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = [pool.submit(_one, work, cell, _file(out, cell)) for cell in missing]
        for cell in running:
            cell.result()


def _file(out: Path, cell: Cell) -> Path:
    return out / f"{'-'.join(map(str, cell))}.json"


def _one(work: Callable[..., dict[str, Any]], cell: Cell, file: Path) -> None:
    torch.set_num_threads(1)
    if platform.system() == "Linux":
        # Keep freed memory: glibc otherwise returns it to the system after every step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 2**31 - 1)
    about = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "weft": weft.__version__,
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({**work(*cell), **about}, indent=1))
    os.replace(temporary, file)
    print(f"{file.stem}: done", flush=True)
