"""What the tasks of a choice own, from the bundles that a comparison kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.assembly import load_experiment_base
from weft.bank import Bank
from weft.comparing import Fleet
from weft.comparing.cells import Cell
from weft.core.model import MultiTaskModel
from weft.errors import WeftError
from weft.planning.plans import Selection
from weft.reports import TaskReport
from weft.reports.compared import Owned
from weft.reports.similarity import relative_change, similarity

from .banks import bank_report

MOST = 4 * 1024**3
"""Bytes of changes that may be held to tell how alike tasks are."""


def owned_by(fleet: Fleet, selections: Sequence[Selection]) -> tuple[tuple[Owned, ...], str]:
    """What tasks own in each of some selections.

    Args:
        fleet: the comparison.
        selections: choices that cover every task.

    Returns:
        One for each selection whose bundles are there, and why there are none.
    """
    cells = {cell.name: cell for cell in fleet.cells}
    found, reason = [], "There is no plan whose tasks could be shown."
    for selection in selections:
        name = "The plan" if selection.name == "plan" else f"All tasks by {selection.name}"
        chosen = {
            task: cells.get(pick.cells[pick.best_seed(heads=False)])
            for pick in selection.picks
            for task in pick.tasks
        }
        there = {t: c for t, c in chosen.items() if c is not None and c.folder.bank.is_dir()}
        try:
            reports = [bank_report(Bank(c.folder.bank, create=False), t) for t, c in there.items()]
        except WeftError as error:
            reason = str(error)
            continue
        if not reports:
            reason = f"The bundles of the cells are gone from {fleet.root}."
            continue
        gone = [task for task in chosen if task not in there]
        found.append(_owned(name, reports, there, gone))
    return tuple(found), reason


def _owned(name: str, reports: list[TaskReport], cells: dict[str, Cell], gone: list[str]) -> Owned:
    """The map of one selection with the similarity of its tasks."""
    notes = [f"The bundle of {task} is gone." for task in gone]
    most = sum(r.ledger.base_parameters * 8 for r in reports if r.ledger.own_parameters)
    if most > MOST:
        notes.append(f"Similarity is left out: it would take {most / 1024**3:.0f} GB of memory.")
        return Owned(name, tuple(reports), None, " ".join(notes))
    changes: dict[str, dict[str, Tensor]] = {}
    for report in reports:
        try:
            changes[report.name] = own_changes(cells[report.name], report)
        except Exception as error:  # a base of a user's own may fail in any way
            notes.append(f"Similarity leaves out {report.name}: {error}")
    try:
        alike = similarity(changes) if len(changes) > 1 else None
    except WeftError as error:
        alike = None
        notes.append(str(error))
    return Owned(name, tuple(reports), alike, " ".join(notes))


def own_changes(cell: Cell, report: TaskReport) -> dict[str, Tensor]:
    """By parameter that a task owns or adapts, its change relative to the base.

    What an adapter adds is folded into the parameters beside it. Running statistics are left out.

    Args:
        cell: whose bank has the task.
        report: of the task.

    Raises:
        WeftError: the base cannot be made, the bundle is damaged, or it has no plain form.
    """
    owned = [row for row in report.ledger.rows if not row.shared]
    if not owned:
        return {}
    base, _ = load_experiment_base(cell.experiment)
    bank = Bank(cell.folder.bank, create=False)
    names = bank.tasks()
    model = bank.load(base, *names, output=cell.experiment.base.output)
    return changes_of(model, report)


def changes_of(model: MultiTaskModel, report: TaskReport) -> dict[str, Tensor]:
    """The same of a model that holds the task."""
    owned = [row for row in report.ledger.rows if not row.shared]
    tensors = {row.tensor for row in owned if row.size}
    sites = {row.site for row in owned if not row.size}
    before = dict(model.base.named_parameters())
    after = dict(model.fold(report.name).named_parameters())
    found = {}
    for name, tensor in after.items():
        if name not in tensors and name.rpartition(".")[0] not in sites:
            continue
        start = before[name] if name in before else torch.zeros_like(tensor)
        if tensor.shape == start.shape and tensor.is_floating_point():
            found[name] = relative_change(tensor, start)
    return found
