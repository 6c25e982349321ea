"""Reports: ledgers, layer maps, training curves and accuracy against bytes in one HTML file."""

from .page import overview_figure, report
from .records import HasTaskReports, Point, TaskReport, from_model, task_report

__all__ = [
    "HasTaskReports",
    "Point",
    "TaskReport",
    "from_model",
    "overview_figure",
    "report",
    "task_report",
]
