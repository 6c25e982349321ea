"""Reports of whatever holds tasks: a model, a bank, a comparison, or reports made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.bank import Bank
from weft.bank.store import BANK
from weft.comparing.fleet import DOCUMENT
from weft.core.model import MultiTaskModel
from weft.errors import DataError
from weft.reports import Point, TaskReport, page
from weft.reports.comparison import comparison_page

from .banks import bank_reports
from .comparisons import read_compared

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["bank_reports", "report"]


def report(
    source: MultiTaskModel | Bank | Sequence[TaskReport] | pd.DataFrame | str | Path,
    path: str | Path,
    *,
    comparison: Sequence[Point] = (),
    budget: int | str | None = None,
    title: str | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Write one HTML file that needs nothing else: ledgers, layer map, curves, accuracy and bytes.

    Args:
        source: a model, a bank, reports of tasks; or a comparison: what `weft.compare` returned, or
            the folder of a bank or of a comparison.
        path: the HTML file to write.
        comparison: runs of several methods, for the picture of accuracy against bytes; not for a
            comparison, which has its own.
        budget: of a comparison, the budget whose plan is shown, as for `weft.plan`; default that of
            ``plan.yaml`` in its folder, else the smallest that brings most of the gain.
        title: of the page.
        figures: a folder to write the figures to as SVG and PNG as well.

    Returns:
        The file.

    Raises:
        DataError: there is no task to report on, or the folder is neither bank nor comparison.
        PlanError: nothing fits the budget.
        ConfigError: the budget is none.
    """
    import pandas as pd

    folder = None if figures is None else Path(figures)
    found = _opened(Path(source)) if isinstance(source, (str, Path)) else source
    try:
        if isinstance(found, (Path, pd.DataFrame)):
            if comparison:
                raise DataError("A comparison has its own points; leave out comparison=.")
            compared = read_compared(found, budget)
            title = title or "What each task should own"
            return comparison_page(compared, path, title=title, figures=folder)
        if budget is not None:
            raise DataError("A budget belongs to a comparison; these are trained tasks.")
        described = bank_reports(found) if isinstance(found, Bank) else found
        return page.report(
            described,
            Path(path),
            comparison=comparison,
            title=title or "weft report",
            figures=folder,
        )
    except OSError as error:
        raise DataError(f"The report cannot be written: {error}. Choose another place.") from error


def _opened(path: Path) -> Bank | Path:
    """The bank of a folder, or the folder itself if it is a comparison's.

    Raises:
        DataError: it is neither.
    """
    if (path / DOCUMENT).is_file():
        return path
    for place in (path, path / "bank"):
        if (place / BANK).is_file():
            return Bank(place, create=False)
    what = "is neither a bank nor the folder of a comparison" if path.is_dir() else "is no folder"
    raise DataError(f"{path} {what}. Give the bank of weft train, or the output of weft compare.")
