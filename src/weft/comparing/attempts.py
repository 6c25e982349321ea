"""An attempt at a cell: locked, and with an end that is told whatever it is."""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, final

from weft.errors import WeftError

from .cells import FAILURE, LOCK, LOG, Cell
from .files import disk_is_full, put, put_json
from .locks import held
from .running import OnEpoch, run_cell


@final
@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Args:
        end: "finished", "failed", or "elsewhere": another living process is at it.
        reason: why it failed, one sentence; "" otherwise.
        full: whether it failed because no space is left on the disk.
    """

    end: Literal["finished", "failed", "elsewhere"]
    reason: str = ""
    full: bool = False


def attempt(cell: Cell, on_epoch: OnEpoch) -> Outcome:
    """Run a cell unless it is finished or another process runs it.

    A failure is noted in the cell's folder, with its traceback.

    Args:
        cell: the cell.
        on_epoch: called with the number of epochs that are done, after each.
    """
    try:
        with held(cell.file(LOCK)) as mine:
            if not mine:
                return Outcome("elsewhere")
            if not cell.finished:
                run_cell(cell, on_epoch)
            return Outcome("finished")
    except Exception as error:  # whatever a user's base or data raises concerns this cell alone
        reason = str(error) if isinstance(error, WeftError) else f"{type(error).__name__}: {error}"
        note_failure(cell, reason, traceback.format_exc())
        return Outcome("failed", reason, disk_is_full(error))


def note_failure(cell: Cell, reason: str, log: str) -> None:
    """Leave the reason of a failure in the cell's folder, if there is space for it.

    Args:
        cell: the cell.
        reason: one sentence.
        log: everything that is known.
    """
    with suppress(WeftError):
        put_json(cell.file(FAILURE), {"cell": cell.name, "reason": reason})
        put(cell.file(LOG), log.encode())
