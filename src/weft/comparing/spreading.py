"""Cells in parallel processes, each with its device and its share of the threads."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import final

import torch

from weft.errors import ConfigError, TrainingError

from .attempts import Outcome, attempt, note_failure
from .cells import Cell

OnEvent = Callable[[Cell, int | Outcome | None], None]
"""Called when a cell begins (None), after each epoch (how many are done), and when it ends."""

PATIENCE = 5.0
"""Seconds in which a process must end before it is killed."""


def run_here(cells: Iterable[Cell], on_event: OnEvent) -> None:
    """Run cells one after the other in this process.

    Args:
        cells: in this order.
        on_event: called as they go.

    Raises:
        TrainingError: no space is left on the disk.
    """
    for cell in cells:
        on_event(cell, None)
        outcome = attempt(cell, partial(on_event, cell))
        on_event(cell, outcome)
        refuse_full_disk(outcome)
        gc.collect()


def refuse_full_disk(outcome: Outcome) -> None:
    """Stop everything when no space is left: every other cell would fail as well.

    Raises:
        TrainingError: no space is left.
    """
    if outcome.full:
        raise TrainingError(
            f"No space is left on the disk: {outcome.reason} Finished cells are kept; free some "
            "space and run the same command again."
        )


def visible_devices() -> tuple[str, ...]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return tuple(name for name in stated.split(",") if name)
    return tuple(str(i) for i in range(torch.cuda.device_count()))


def check_devices(devices: Sequence[str]) -> tuple[str, ...]:
    """The devices to deal to processes; all that are visible if none are named.

    Args:
        devices: numbers of CUDA devices, or "cpu".

    Raises:
        ConfigError: one that is not there.
    """
    known = visible_devices()
    for device in devices:
        if device not in (*known, "cpu"):
            there = ", ".join(("cpu", *known))
            raise ConfigError(f"device: found '{device}', expected one of {there}.")
    return tuple(devices) or known


@final
@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str | None
    cell: Cell | None = None
    ready: bool = False


def run_spread(cells: Iterable[Cell], jobs: int, devices: Sequence[str], on_event: OnEvent) -> None:
    """Run cells in parallel processes; one that dies takes no other with it.

    Args:
        cells: begun in this order.
        jobs: how many processes, >= 1.
        devices: numbers of CUDA devices, or "cpu", dealt to the processes in turn; none leaves the
            choice to each process.
        on_event: called as they go.

    Raises:
        TrainingError: processes cannot start, or no space is left on the disk.
    """
    waiting = deque(cells)
    threads = max(1, torch.get_num_threads() // jobs)
    dealt = [devices[i % len(devices)] if devices else None for i in range(jobs)]
    workers: list[_Worker] = []
    try:
        workers += [_start(device, threads) for device in dealt[: len(waiting)]]
        while workers:
            ready = wait([worker.pipe for worker in workers])
            for worker in [w for w in workers if w.pipe in ready]:
                try:
                    told = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    workers.remove(worker)
                    _bury(worker, on_event)
                    if waiting:
                        workers.append(_start(worker.device, threads))
                    continue
                if worker.cell is not None:
                    on_event(worker.cell, told)
                if isinstance(told, int):
                    continue
                if isinstance(told, Outcome):
                    refuse_full_disk(told)
                worker.ready, worker.cell = True, None
                if not waiting:
                    workers.remove(worker)
                    _stop(worker)
                    continue
                worker.cell = waiting.popleft()
                on_event(worker.cell, None)
                with suppress(ConnectionError):  # it has died, which the next wait tells
                    worker.pipe.send(worker.cell)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            _stop(worker)


def _start(device: str | None, threads: int) -> _Worker:
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, device, threads), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, mine, device)


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(PATIENCE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _bury(worker: _Worker, on_event: OnEvent) -> None:
    """Tell how a process ended that was at a cell.

    Raises:
        TrainingError: it ended before it could do anything.
    """
    worker.pipe.close()
    worker.process.join(PATIENCE)
    code = worker.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    if not worker.ready:
        raise TrainingError(
            f"A process for cells ended as soon as it began ({how}); see above for why. In a "
            "script, call weft.compare below if __name__ == '__main__'."
        )
    if worker.cell is not None:
        reason = f"Its process ended by {how}, perhaps for lack of memory."
        note_failure(worker.cell, reason, reason + "\n")
        on_event(worker.cell, Outcome("failed", reason))


def _work(pipe: Connection, device: str | None, threads: int) -> None:
    """What a process does: cells, until there are no more or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what ctrl-C ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    pipe.send(None)
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(cell, pipe.send))
        gc.collect()


def _end_with_parent() -> None:
    """End this process when its parent ends, however that ends; a cell can always go on."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
