"""A bank for a plan, from the bundles that the comparison kept."""

from __future__ import annotations

from pathlib import Path

from weft.assembly import load_experiment_base
from weft.bank import Bank
from weft.comparing import open_fleet
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
    for pick in plan.chosen.picks:
        name = pick.cells[pick.best_seed(heads=plan.question.heads)]
        if name not in cells or not cells[name].folder.bank.is_dir():
            raise PlanError(f"The bundle of {name} is gone from {plan.comparison}.")
        experiment = cells[name].experiment
        base, _ = load_experiment_base(experiment)
        kept = Bank(cells[name].folder.bank, create=False)
        bank.save(kept.load(base, *pick.tasks, output=experiment.base.output), *pick.tasks)
    return bank
