"""Plans on disk: what a reader needs to run and extend a task, without the method that made it.

Charges (penalties) and functions of phases are code and are not stored. A plan that has them comes
back without, and refuses to train until the method's own plan is handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor

from weft.adapters import INSERTIONS
from weft.core.adapter import Records
from weft.core.patch import Patch
from weft.core.sharing import Created, Group, Penalty, Phase, Sharing, Turn
from weft.errors import BankError, PlanError
from weft.patches import PATCHES

from .documents import plain, tuples

_FUNCTIONS = ("prepare", "each_epoch", "transition", "review")
_CORE = ("method", "options", "patches", "adapters", "created", "train_shared")
_MASKS = ("masked", "head_buffers")


def encode_patches(patches: Mapping[str, Patch]) -> list[dict[str, Any]]:
    """Patches by tensor name, those that are equal together."""
    return _grouped(patches, PATCHES, "tensors", "weft.patches.PATCHES")


def decode_patches(entries: Iterable[Mapping[str, Any]]) -> dict[str, Patch]:
    """The inverse of `encode_patches`."""
    return _ungrouped(entries, PATCHES, "tensors", "patch")


def encode_plan(plan: Sharing) -> dict[str, Any]:
    """A plan as plain values.

    Args:
        plan: the plan; its created tensors go to a file of their own.

    Raises:
        BankError: an option without a plain form, or a patch or insertion without a name.
    """
    lost = [f"charge {type(p).__name__}" for p in plan.penalties]
    for phase in plan.phases:
        if any(getattr(phase, name) is not None for name in _FUNCTIONS):
            lost.append(f"function of phase '{phase.name}'")
    groups = [{"match": list(g.match), "lr": g.lr, "decay": g.decay} for g in plan.groups]
    entry = {
        "method": plan.method,
        "options": plain(dict(plan.options), f"options of '{plan.method}'"),
        "patches": encode_patches(plan.patches),
        "adapters": _grouped(plan.adapters, INSERTIONS, "sites", "weft.adapters.INSERTIONS"),
        "created": {key: {"trains": c.trains} for key, c in plan.created.items()},
        "train_shared": sorted(plan.train_shared),
        "groups": plain(groups, "groups"),
        "refused": plain(dict(plan.refused), "refused"),
    }
    if plan.masked or plan.head_buffers:
        entry |= {"masked": sorted(plan.masked), "head_buffers": list(plan.head_buffers)}
    if lost:
        return {**entry, "not_stored": lost}
    return {**entry, "phases": [_encode_phase(phase) for phase in plan.phases]}


def _encode_phase(phase: Phase) -> dict[str, Any]:
    values = {f.name: getattr(phase, f.name) for f in fields(phase) if f.name not in _FUNCTIONS}
    encoded = {**values, "turns": [asdict(turn) for turn in phase.turns]}
    return {name: plain(value, f"phase '{phase.name}'") for name, value in encoded.items()}


def _decode_phase(entry: Mapping[str, Any]) -> Phase:
    turns = tuple(Turn(**{k: tuples(v) for k, v in t.items()}) for t in entry.get("turns", ()))
    return Phase(**{**{k: tuples(v) for k, v in entry.items()}, "turns": turns})


def decode_plan(entry: Mapping[str, Any], created: Mapping[str, Tensor]) -> Sharing:
    """A plan from plain values.

    Args:
        entry: as `encode_plan` makes it.
        created: the shared tensors that the plan added, by key.

    Raises:
        BankError: a patch or insertion that this release does not know.
    """
    guard = _NotStored(entry["method"]) if "not_stored" in entry else None
    return Sharing(
        entry["method"],
        options=entry["options"],
        patches=decode_patches(entry["patches"]),
        adapters=_ungrouped(entry["adapters"], INSERTIONS, "sites", "insertion"),
        created={k: Created(created[k], c["trains"]) for k, c in entry["created"].items()},
        train_shared=frozenset(entry["train_shared"]),
        penalties=(guard,) if guard else (),
        phases=(Phase("not stored", prepare=guard.prepare),)
        if guard
        else tuple(_decode_phase(phase) for phase in entry["phases"]),
        groups=tuple(Group(**{k: tuples(v) for k, v in g.items()}) for g in entry["groups"]),
        refused=entry["refused"],
        masked=frozenset(entry.get("masked", ())),
        head_buffers=tuple(entry.get("head_buffers", ())),
    )


@dataclass(frozen=True)
class _NotStored(Penalty):
    """Stands for charges and functions of a plan that are not in the bank.

    Args:
        method: the plan's method.
    """

    method: str

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],  # noqa: ARG002
        shared: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        raise self._refusal()

    def prepare(self, model: object, data: object) -> None:  # noqa: ARG002
        """Refuse to begin a phase."""
        raise self._refusal()

    def _refusal(self) -> PlanError:
        return PlanError(
            f"The plan '{self.method}' charges or prepares by code that a bank does not store. "
            f"To train these tasks on, hand the plan in with the same options: "
            f"bank.load(base, sharing=weft.{self.method}(base, ...)), or a list of plans if tasks "
            "have different ones; bank.info(task) shows them. A plan that was tied to a mean is "
            "weft.tie_to_mean(plan, base, ...) again."
        )


def _grouped(
    items: Mapping[str, Any], registry: Mapping[str, type[Any]], what: str, where: str
) -> list[dict[str, Any]]:
    kinds = {cls: kind for kind, cls in registry.items()}
    entries = []
    # Neighbours only, so that the order stays.
    for item, group in groupby(items.items(), key=lambda pair: pair[1]):
        names = [name for name, _ in group]
        if type(item) not in kinds:
            raise BankError(
                f"{type(item).__name__} at '{names[0]}' has no name for files. "
                f"Register it: {where}['my_name'] = {type(item).__name__}"
            )
        options = {f.name: getattr(item, f.name) for f in fields(item) if f.init}
        entry = {"kind": kinds[type(item)], "options": plain(options, type(item).__name__)}
        if _made(registry, entry, "") != item:
            raise BankError(
                f"{type(item).__name__} at '{names[0]}' does not come back from its fields "
                f"{entry['options']}; its fields must be plain values and compare equal."
            )
        entries.append({**entry, what: names})
    return entries


def _ungrouped(
    entries: Iterable[Mapping[str, Any]], registry: Mapping[str, type[Any]], what: str, noun: str
) -> dict[str, Any]:
    return {n: item for e in entries for item in [_made(registry, e, noun)] for n in e[what]}


def _made(registry: Mapping[str, type[Any]], entry: Mapping[str, Any], noun: str) -> Any:
    kind = entry["kind"]
    if kind not in registry:
        raise BankError(
            f"The {noun} '{kind}' is unknown here; known: {', '.join(registry) or 'none'}. "
            "Upgrade weft, or import the module that registers it."
        )
    return registry[kind](**{key: tuples(value) for key, value in entry["options"].items()})


class PlanShelf:
    """Plans that came back from files: equal entries give one plan while it is in use."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Sharing, Mapping[str, Any]] = WeakKeyDictionary()
        self._made: WeakSet[Sharing] = WeakSet()

    def plan(self, entry: Mapping[str, Any], created: Mapping[str, Tensor]) -> Sharing:
        """The plan of an entry, with the shared tensors that it added."""
        for plan in [] if created else list(self._made):
            if self._entries[plan] == entry:
                return plan
        plan = decode_plan(entry, created)
        self._entries[plan] = entry
        self._made.add(plan)
        return plan

    def same(self, plan: Sharing, entry: Mapping[str, Any]) -> bool:
        """Whether a plan at hand has the method, options and effect that an entry describes."""
        if plan.method != entry["method"]:
            return False
        if plan not in self._entries:
            try:
                self._entries[plan] = encode_plan(plan)
            except BankError:  # a plan that cannot be stored is none that was
                self._entries[plan] = {}
        known = self._entries[plan]
        alike = all(known.get(key) == entry[key] for key in _CORE)
        return alike and all(known.get(key) == entry.get(key) for key in _MASKS)
