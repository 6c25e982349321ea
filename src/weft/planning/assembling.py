"""A bank for a plan, from the bundles that the comparison kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from weft.assembly import load_experiment_base
from weft.bank import Bank
from weft.comparing import open_fleet
from weft.comparing.cells import Cell
from weft.errors import PlanError

from .plans import Plan


def assemble(plan: Plan, path: str | Path) -> Bank:
    """Put the tasks of a plan into one bank; nothing is trained.

    Of each choice the seed that is best on validation is taken.

    Args:
        plan: made from the folder of a comparison.
        path: the bank's folder; it must hold no tasks yet.

    Returns:
        The bank. Tasks that were trained together load together, ``bank.load(base, *tasks)``.

    Raises:
        PlanError: the plan is of a table, a cell's bundle is gone, or the bank holds tasks.
        BankError: a file is damaged or cannot be written.
    """
    if plan.comparison is None:
        raise PlanError(
            "The plan was made from a table, which holds no bundles. Give weft.plan the folder of "
            "the comparison."
        )
    bank = Bank(path)
    if len(bank):
        raise PlanError(f"{path} holds tasks already. Give a new folder.")
    cells = {cell.name: cell for cell in open_fleet(plan.comparison).cells}
    picked = []
    for pick in plan.chosen.picks:
        name = pick.cells[pick.best_seed(heads=plan.question.heads)]
        if name not in cells or not cells[name].folder.bank.is_dir():
            raise PlanError(
                f"The bundle of {name} is gone from {plan.comparison}. Train what was chosen anew: "
                "weft train --plan."
            )
        picked.append(cells[name])
    return gather(picked, bank)


def gather(cells: Iterable[Cell], bank: Bank, *, replace: bool = False) -> Bank:
    """Copy the tasks of finished cells into a bank; those that are there already stay.

    Args:
        cells: whose banks hold their tasks.
        bank: to copy to.
        replace: whether a task from elsewhere gives way.

    Returns:
        The bank.

    Raises:
        PlanError: the bank holds one of the tasks from elsewhere.
        BankError: a file is damaged or cannot be written.
    """
    for cell in cells:
        kept = Bank(cell.folder.bank, create=False)
        there = [task for task in cell.tasks if task in bank]
        same = [t for t in there if bank.info(t)["facts"] == kept.info(t)["facts"]]
        if len(same) < len(there) and not replace:
            other = next(task for task in there if task not in same)
            raise PlanError(f"{bank.path} holds another '{other}'. Give a new folder.")
        if len(same) < len(cell.tasks):
            base, _ = load_experiment_base(cell.experiment)
            output = cell.experiment.base.output
            bank.save(kept.load(base, *cell.tasks, output=output), *cell.tasks)
    return bank
