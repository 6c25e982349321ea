"""The ledger: what a task owns, what it shares, and what both cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .patch import Patch
from .sites import Kind, Site, named_tensors, sites


@dataclass(frozen=True)
class Row:
    """One tensor of the base, or one tensor that a plan adds for a task.

    Args:
        tensor: its name.
        site: the module that holds it.
        kind: what that module is.
        shared: whether the task uses the shared tensor as it is.
        buffer: whether it is a buffer.
        size: elements of the base tensor (0 for an added one).
        own: elements that the task owns because of it.
        own_bytes: bytes of those.
        score: the score of its gate, if it has or had one.
    """

    tensor: str
    site: str
    kind: str
    shared: bool
    buffer: bool
    size: int
    own: int
    own_bytes: int
    score: float | None


@dataclass(frozen=True)
class Stored:
    """What files of a bank take, in bytes; zeros of sparse tensors are left out there.

    Args:
        own: the task's own tensors.
        head: its head.
        shared: what the tasks of its model trained or added together, once for all of them.
    """

    own: int
    head: int
    shared: int


@dataclass(frozen=True)
class Ledger:
    """What one task owns, shares and costs.

    Args:
        task: the task's name.
        rows: a row per tensor of the base, in the base's order, then the added ones.
        head_parameters: elements of the head's parameters.
        head_bytes: bytes of the head's parameters and buffers.
        shared_parameters: elements of the parameters that the model's plan trains or adds, once
            for all its tasks.
        stored: what the task's files take, if the ledger is one of a bank.
    """

    task: str
    rows: tuple[Row, ...]
    head_parameters: int
    head_bytes: int
    shared_parameters: int = 0
    stored: Stored | None = field(default=None, compare=False)

    @property
    def own_parameters(self) -> int:
        """Parameters that the task owns, without its head."""
        return sum(r.own for r in self.rows if not r.buffer)

    @property
    def own_buffers(self) -> int:
        """Buffer elements that the task owns: running statistics, masks."""
        return sum(r.own for r in self.rows if r.buffer)

    @property
    def own_bytes(self) -> int:
        """Bytes of the own parameters and buffers, without the head."""
        return sum(r.own_bytes for r in self.rows)

    @property
    def base_parameters(self) -> int:
        """Parameters of the base."""
        return sum(r.size for r in self.rows if not r.buffer)

    @property
    def own_fraction(self) -> float:
        """Own parameters over the base's parameters."""
        return self.own_parameters / max(self.base_parameters, 1)

    @property
    def open_gates(self) -> tuple[int, int]:
        """How many gated sites the task owns, and how many gates there are."""
        gated: dict[str, bool] = {}
        for row in self.rows:
            if row.score is not None:
                gated[row.site] = gated.get(row.site, False) or not row.shared
        return sum(gated.values()), len(gated)

    def to_dict(self) -> dict[str, object]:
        """The totals as plain values, for JSON."""
        opened, gates = self.open_gates
        return {
            "task": self.task,
            "own_parameters": self.own_parameters,
            "own_buffers": self.own_buffers,
            "own_bytes": self.own_bytes,
            "own_fraction": self.own_fraction,
            "head_parameters": self.head_parameters,
            "head_bytes": self.head_bytes,
            "shared_parameters": self.shared_parameters,
            "base_parameters": self.base_parameters,
            "open_gates": opened,
            "gates": gates,
        }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def hardened(
    base: Mapping[str, Tensor],
    patches: Mapping[str, Patch],
    own: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
) -> tuple[dict[str, Patch], dict[str, Tensor]]:
    """A task's patches and own tensors once its gates are final; tensors of adapters stay.

    Args:
        base: the base's tensors by name.
        patches: the task's patches by base tensor name.
        own: the task's own tensors by key.
        shared: the shared tensors that the model's plan adds, by key.
    """
    tensors = {**shared, **own}
    kept: dict[str, Patch] = {}
    remaining: dict[str, Tensor] = {}
    for name, patch in patches.items():
        final, left = patch.harden(name, base[name], tensors)
        if final is not None:
            kept[name] = final
            remaining.update(left)
    read = _read_by(patches)
    return kept, {**remaining, **{key: t for key, t in own.items() if key not in read}}


def _read_by(patches: Mapping[str, Patch]) -> set[str]:
    """The keys of own tensors that patches read; the others belong to adapters."""
    return {key for name, patch in patches.items() for key in patch.keys(name)}


def gate_scores(patches: Mapping[str, Patch], own: Mapping[str, Tensor]) -> dict[str, float]:
    """The score of every gate, by base tensor name."""
    scores = {name: patch.gate_score(own) for name, patch in patches.items()}
    return {name: score for name, score in scores.items() if score is not None}


def make_ledger(
    task: str,
    base: nn.Module,
    patches: Mapping[str, Patch],
    own: Mapping[str, Tensor],
    known_scores: Mapping[str, float],
    head: nn.Module | None,
    shared: Mapping[str, Tensor] | None = None,
    shared_parameters: int = 0,
) -> Ledger:
    """The ledger of a task as it would be stored now: gates final, closed layers shared.

    Args:
        task: the task's name.
        base: the base.
        patches: the task's patches by base tensor name.
        own: the task's own tensors by key, those of adapters included.
        known_scores: scores of gates that are final already, by base tensor name.
        head: the task's head, if it is built.
        shared: the shared tensors that the model's plan adds, by key.
        shared_parameters: elements of what the model's plan trains or adds.
    """
    tensors = dict(named_tensors(base))
    buffers = {name for name, t in tensors.items() if not isinstance(t, nn.Parameter)}
    kept, remaining = hardened(tensors, patches, own, shared or {})
    read = _read_by(kept)
    added = {key: t for key, t in remaining.items() if key not in read}
    where = {n: s for s in reversed(sites(base)) for n in s.parameters + s.statistics}
    scores = {**gate_scores(patches, own), **known_scores}

    rows = []
    counted: set[str] = set()
    for name, tensor in tensors.items():
        site = where.get(name, Site(name.rpartition(".")[0], Kind.OTHER, ()))
        keys = [k for k in (kept[name].keys(name) if name in kept else ()) if k not in counted]
        counted.update(keys)
        rows.append(
            Row(
                tensor=name,
                site=site.name,
                kind=site.kind.value,
                shared=name not in kept,
                buffer=name in buffers,
                size=tensor.numel(),
                own=sum(remaining[k].numel() for k in keys),
                own_bytes=sum(_bytes(remaining[k]) for k in keys),
                score=scores.get(name),
            )
        )
    for key, tensor in added.items():
        buffer = not isinstance(tensor, nn.Parameter)
        site_name = key.partition(":")[0]
        size = tensor.numel()
        rows.append(Row(key, site_name, "adapter", False, buffer, 0, size, _bytes(tensor), None))
    head_tensors = [] if head is None else [*head.parameters(), *head.buffers()]
    return Ledger(
        task,
        tuple(rows),
        head_parameters=0 if head is None else sum(p.numel() for p in head.parameters()),
        head_bytes=sum(_bytes(t) for t in head_tensors),
        shared_parameters=shared_parameters,
    )
