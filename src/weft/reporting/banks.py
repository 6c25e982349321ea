"""The tasks of a bank as reports see them."""

from __future__ import annotations

from weft.bank import Bank
from weft.reports import TaskReport, task_report


def bank_reports(bank: Bank) -> list[TaskReport]:
    """The reports of a bank's tasks, from their stored ledgers; no tensor is read."""
    return [bank_report(bank, name) for name in bank.tasks()]


def bank_report(bank: Bank, name: str) -> TaskReport:
    """The report of one task of a bank."""
    info = bank.info(name)
    shared = info["shared"]["bytes"] if info["shared"] else 0
    method, ledger, facts = info["plan"]["method"], bank.ledger(name), info["facts"]
    size = bank.base()["bytes"]
    return task_report(name, method, ledger, facts, base_bytes=size, shared_bytes=shared)
