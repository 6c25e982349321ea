"""A look at every file of a bank, collecting what is wrong instead of stopping at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import BankError

from .bundles import read_bundle
from .checking import BaseCheck, trained_names, well_formed
from .fingerprint import UNKNOWN, Marks, difference, without_values
from .store import Store, folded


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a bank.

    Args:
        task: the task that it concerns; "" for the bank itself.
        text: what was found, what was expected, what to do.
    """

    task: str
    text: str

    def __str__(self) -> str:
        return f"{self.task}: {self.text}" if self.task else self.text


def problems(store: Store, marks: Marks | None) -> list[Problem]:
    """What is wrong with a bank.

    Args:
        store: its files.
        marks: of a base to compare it with, if there is one.
    """
    found: list[Problem] = []
    known: Marks = {}
    try:
        with store.reading(), well_formed("bank.json"):
            known = store.marks()
    except BankError as error:
        found.append(Problem("", str(error)))
    if marks is not None and known and (wrong := difference(known, marks)):
        found.append(Problem("", f"The base is another one: {wrong}."))
    try:
        with store.reading():
            entries = list(store.entries())
    except BankError as error:
        return [*found, Problem("", str(error))]
    states: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, wrong in entries:
        twin = names.setdefault(folded(name), name)
        wrong = wrong or (f"it differs from '{twin}' by case only." if twin != name else "")
        wrong = wrong or _problem(store, name, known, states)
        if wrong:
            found.append(Problem(name, wrong))
    return found


def _problem(store: Store, task: str, known: Marks, states: dict[str, str]) -> str:
    try:
        with store.reading(), well_formed(task):
            entry = read_bundle(store.place(task), task, verify=True).entry
            _check_base(store, entry, known)
            shared = entry["shared"]
            if shared is None:
                return ""
            if shared["sha256"] not in states:
                states[shared["sha256"]] = _shared_problem(store, shared)
            return states[shared["sha256"]]
    except BankError as error:
        return str(error)


def _check_base(store: Store, entry: Mapping[str, Any], known: Marks) -> None:
    """Compare a bundle with what the bank knows of its base, where it knows enough."""
    names = frozenset(trained_names(entry))
    marks = without_values(known, names)
    if marks and not any(m.endswith(f" {UNKNOWN}") for n, m in marks.items() if n not in names):
        BaseCheck(store, marks)(entry)


def _shared_problem(store: Store, shared: Mapping[str, Any]) -> str:
    try:
        store.read_shared(shared, verify=True)
    except BankError as error:
        return str(error)
    return ""
