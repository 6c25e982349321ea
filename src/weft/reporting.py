"""Reports of whatever holds tasks: a model, a bank, or reports made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .bank import Bank
from .core.model import MultiTaskModel
from .errors import DataError
from .reports import Point, TaskReport, page, task_report


def report(
    source: MultiTaskModel | Bank | Sequence[TaskReport],
    path: str | Path,
    *,
    comparison: Sequence[Point] = (),
    title: str = "weft report",
    figures: str | Path | None = None,
) -> Path:
    """Write one HTML file that needs nothing else: ledgers, layer map, curves, accuracy and bytes.

    Args:
        source: a model, a bank, or reports of tasks.
        path: the HTML file to write.
        comparison: runs of several methods, for the picture of accuracy against bytes.
        title: of the page.
        figures: a folder to write the figures to as SVG and PNG as well.

    Returns:
        The file.

    Raises:
        DataError: there is no task to report on.
    """
    described = bank_reports(source) if isinstance(source, Bank) else source
    folder = None if figures is None else Path(figures)
    try:
        return page.report(
            described, Path(path), comparison=comparison, title=title, figures=folder
        )
    except OSError as error:
        raise DataError(f"The report cannot be written: {error}. Choose another place.") from error


def bank_reports(bank: Bank) -> list[TaskReport]:
    """The reports of a bank's tasks, from their stored ledgers; no tensor is read."""
    size = bank.base()["bytes"]
    reports = []
    for name in bank.tasks():
        info = bank.info(name)
        shared = info["shared"]["bytes"] if info["shared"] else 0
        method, ledger, facts = info["plan"]["method"], bank.ledger(name), info["facts"]
        reports.append(
            task_report(name, method, ledger, facts, base_bytes=size, shared_bytes=shared)
        )
    return reports
