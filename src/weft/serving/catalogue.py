"""What a server knows of tasks without loading them: the bank's documents, read once each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from weft.bank import Bank
from weft.bank.checking import well_formed
from weft.bank.plans import decode_patches

from .halving import halvable


@final
@dataclass(frozen=True)
class Summary:
    """A task in brief.

    Args:
        method: the method that made it.
        kind: of task, for instance "classification"; None for tasks of one's own.
        classes: names of its classes; None where it has none.
        ledger: totals of what it owns, as `Ledger.to_dict` gives them.
        metrics: by split and name.
        size: bytes of its own tensors and its head.
        half_size: the same with own tensors in half precision where that is possible.
    """

    method: str
    kind: str | None
    classes: tuple[str, ...] | None
    ledger: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    size: int
    half_size: int


@final
class Catalogue:
    """Summaries of a bank's tasks, each read anew when its bundle has changed.

    Args:
        bank: the bank.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._known: dict[str, tuple[tuple[int, ...], Summary]] = {}

    def __getitem__(self, task: str) -> Summary:
        """The summary of a task.

        Raises:
            BankError: there is no such task any more, or its document is damaged.
        """
        stamp = self._bank.stamp(task)
        known = self._known.get(task)
        if known is None or known[0] != stamp:
            with well_formed(task):
                known = self._known[task] = (stamp, summarise(self._bank.info(task)))
        return known[1]

    def forget(self, task: str) -> None:
        """Let go of a task that is gone."""
        self._known.pop(task, None)


def summarise(info: Mapping[str, Any]) -> Summary:
    """A task's document in brief.

    Args:
        info: as `Bank.info` gives it.
    """
    stored, definition = info["ledger"], info["definition"]
    ledger = {k: v for k, v in stored.items() if k not in ("columns", "rows")}
    spec, classes = definition["spec"] or {}, definition["classes"]
    size = ledger["own_bytes"] + ledger["head_bytes"]
    return Summary(
        method=info["plan"]["method"],
        kind=spec.get("kind"),
        classes=None if classes is None else tuple(classes),
        ledger=ledger,
        metrics=_metrics(info["facts"]),
        size=size,
        half_size=size - _saved(info),
    )


def _metrics(facts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics among a task's facts, which may be anything that a user left there."""
    found = facts.get("metrics")
    if not isinstance(found, dict):
        return {}
    splits = {split: values for split, values in found.items() if isinstance(values, dict)}
    return {
        split: {n: float(v) for n, v in values.items() if isinstance(v, (int, float))}
        for split, values in splits.items()
    }


def _saved(info: Mapping[str, Any]) -> int:
    """Bytes that half precision saves, if all values fit into its range."""
    saved = 0
    for key in halvable(decode_patches(info["patches"])):
        words, _, shape = info["own"]["tensors"][key].partition(" ")
        width = {"float32": 4, "float64": 8}.get(words, 2)
        elements = 1
        for size in shape.strip("[]").split(","):
            elements *= int(size) if size.strip() else 1
        saved += (width - 2) * elements
    return saved
