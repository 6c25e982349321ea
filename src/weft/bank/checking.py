"""What must hold before bundles become tasks of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from weft.errors import BankError

from .fingerprint import Marks, difference, fingerprint, without_values
from .store import Store

Entries = Mapping[str, Mapping[str, Any]]
"""By task, the content of its ``bundle.json``."""


@contextmanager
def well_formed(task: str) -> Iterator[None]:
    """Report a bundle whose document lacks something as a damaged bundle.

    Raises:
        BankError: in place of errors of looking things up.
    """
    try:
        yield
    except BankError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BankError(
            f"The bundle of '{task}' is not made as this weft makes them "
            f"({type(error).__name__}: {error}). Save the task again."
        ) from error


def model_plan(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan of the model that a bundle was saved from, as far as it matters to the bundle."""
    plan: Mapping[str, Any] = entry.get("model_plan", entry["plan"])
    return plan


def trained_names(entry: Mapping[str, Any]) -> list[str]:
    """Tensors of the base whose values come with the bundle's shared state."""
    names: list[str] = model_plan(entry)["train_shared"]
    return names


class BaseCheck:
    """Compares bundles with one base.

    Args:
        store: the bank's files.
        marks: of the base at hand.
    """

    def __init__(self, store: Store, marks: Marks) -> None:
        self._store = store
        self.marks = marks
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Refuse a bundle that was trained on another base.

        Raises:
            BankError: says which tensors differ.
        """
        trained = tuple(trained_names(entry))
        found = self._fingerprints.get(trained)
        if found is None:
            found = fingerprint(without_values(self.marks, frozenset(trained)))
            self._fingerprints[trained] = found
        expected = entry["base"]["fingerprint"]
        if found == expected:
            return
        bank = self._store.base()
        wrong = difference(without_values(bank["tensors"], frozenset(trained)), self.marks)
        if wrong:
            raise BankError(
                f"'{entry['task']}' was trained on another base ({bank['class']}): {wrong}. "
                "Hand in that base, or pass allow_other_base=True to use this one anyway."
            )
        raise BankError(
            f"The bundle of '{entry['task']}' belongs to another base than this bank: its "
            f"fingerprint is {expected[:12]}…, that of this base {found[:12]}…. It was copied from "
            "another bank: remove it here and load it there."
        )


def one_shared_state(entries: Entries) -> Mapping[str, Any] | None:
    """The shared state that the tasks of one model depend on; None if there is none.

    Raises:
        BankError: they depend on different ones.
    """
    states = {n: e["shared"] for n, e in entries.items() if e["shared"] is not None}
    if not states:
        return None
    first = next(iter(states))
    other = next((n for n in states if states[n] != states[first]), None)
    if other is None and trained_names(entries[first]):
        other = next((n for n in entries if n not in states), None)
    if other is not None:
        theirs = f"{states[other]['sha256'][:12]}…" if other in states else "the untrained base"
        raise BankError(
            f"'{first}' and '{other}' depend on different shared states "
            f"({states[first]['sha256'][:12]}… and {theirs}): they were not trained together, or "
            "one was saved before further training. Load them into a model each: "
            f"bank.load(base, {first!r}) and bank.load(base, {other!r})."
        )
    state: Mapping[str, Any] = states[first]
    return state


def default_plan(entries: Entries) -> Mapping[str, Any]:
    """The plan that a model with these tasks has for further ones."""
    for entry in entries.values():
        if entry["shared"] is not None:
            return model_plan(entry)
    chosen = next((e for e in entries.values() if e["default_plan"]), next(iter(entries.values())))
    plan: Mapping[str, Any] = chosen["plan"]
    return plan


def common_output(entries: Entries) -> str | int | None:
    """What the heads of the tasks read of the base's output, where that was stored.

    Raises:
        BankError: it was a function, or not the same for all.
    """
    found = [entry["output"] for entry in entries.values()]
    first: str | int | None = found[0]
    if all(output == first for output in found) and first is not True:
        return first
    what = "a function" if True in found else "different names"
    raise BankError(
        f"The heads of these tasks read the base's output by {what}, which a bank does not store. "
        "Hand it in: bank.load(base, output=...)."
    )
