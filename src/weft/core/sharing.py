"""The plan: which tensors a task owns, which it shares, what is charged for it, and how it trains.

A `Sharing` is frozen data that a method (a function named after its paper) returns. It holds no
state: a model instantiates it, and two models never share anything through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.errors import PlanError

from .adapter import Insertion, Records
from .patch import Patch

if TYPE_CHECKING:
    from .model import MultiTaskModel


class Penalty(ABC):
    """A charge that is added to the loss once a step, over all tasks of the step together.

    Implementations are frozen dataclasses of plain values: tasks whose plans have equal penalties
    are charged together.
    """

    needs_records: bool = False
    """True if the charge reads what adapters recorded in the forward."""

    @abstractmethod
    def __call__(
        self,
        records: Mapping[str, Records],
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        """The charge, a scalar.

        Args:
            records: by task, what the adapters recorded in this step.
            own: by task, the task's own tensors by key.
            shared: the shared tensors by key: those of the base and those that the plan adds.
        """

    def check_shared(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Refuse a task whose model lacks shared tensors that the charge reads.

        Args:
            own: the task's own tensors by key.
            shared: those that the model's plan created, by key.

        Raises:
            PlanError: one is not there, or is of another shape.
        """

    def figures(self, own: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        """What the history notes about one task in each epoch, for instance a price that moves."""
        return {}


def charges(
    plans: Mapping[str, Sharing],
    records: Mapping[str, Records],
    own: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    factors: Mapping[str, float],
    zero: Tensor,
) -> Tensor:
    """What a step is charged: every penalty once, over all tasks whose plans have it.

    Args:
        plans: by task, its plan.
        records: by task, what adapters recorded.
        own: by task, its own tensors by key.
        shared: the shared tensors by key.
        factors: by task, a factor on its plan's penalties; a task without one follows another
            task with the same penalties.
        zero: the scalar to start from.

    Returns:
        A scalar.
    """
    spoken = {plans[n].penalties: factor for n, factor in factors.items() if n in plans}
    together: dict[tuple[tuple[Penalty, ...], float], list[str]] = {}
    for name, plan in plans.items():
        factor = factors.get(name, spoken.get(plan.penalties, 1.0))
        together.setdefault((plan.penalties, factor), []).append(name)
    total = zero
    for (penalties, factor), names in together.items():
        if factor == 0.0:
            continue
        mine, theirs = {n: records[n] for n in names}, {n: own[n] for n in names}
        for penalty in penalties:
            total = total + factor * penalty(mine, theirs, shared)
    return total


@dataclass(frozen=True)
class Created:
    """A shared tensor that a plan adds: a basis, an expert, a prior mean.

    Args:
        value: its start; copied by each model.
        trains: whether it trains with the tasks.
    """

    value: Tensor
    trains: bool = True


@dataclass(frozen=True)
class Turn:
    """A part of every epoch of a phase: what trains in it, on which data, at which price.

    Args:
        name: for readers.
        train: patterns (shell style) of the own and shared keys that train.
        freeze: patterns of those among them that do not.
        heads: whether heads train.
        penalty: factor on the plan's penalties.
        data: the slice ``(from, to)`` of the training split that it sees, in shares of it; the
            turns of a phase divide each epoch in proportion to the lengths of their slices.
    """

    name: str
    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    heads: bool = True
    penalty: float = 1.0
    data: tuple[float, float] = (0.0, 1.0)

    def trains(self, key: str) -> bool:
        """Whether the tensor of this key trains."""
        return _matches(key, self.train) and not _matches(key, self.freeze)


@dataclass(frozen=True)
class Taken:
    """An optimiser step that was just taken.

    Args:
        batches: by task, inputs and targets of the step's last batch.
        refused: tasks whose loss was over the phase's limit or not a number.
        done: the share of the phase's optimiser steps that are done, in (0, 1].
    """

    batches: Mapping[str, tuple[Any, Any]]
    refused: frozenset[str]
    done: float


@dataclass(frozen=True)
class Phase:
    """A stretch of training: what trains, on which data, at which price, for how long.

    Args:
        name: shown in progress and history.
        epochs: its length in epochs, or None for a share of what the exact ones leave.
        share: its weight among the phases without exact epochs.
        train: patterns (shell style) of the own and shared keys that train in this phase.
        freeze: patterns of those among them that do not.
        heads: whether heads train.
        penalty: factor on the plan's penalties in this phase.
        data: the slice ``(from, to)`` of the training split that it sees, in shares of it.
        turns: parts of each epoch, in order, in place of ``train``, ``freeze``, ``heads``,
            ``penalty`` and ``data`` for the whole of it.
        restart: whether everything that ``freeze`` does not name starts again, when the phase
            begins, from the values it had when training began: tensors, running statistics, heads.
            The optimiser forgets them, and the learning rate runs through its schedule anew.
        selectable: whether its epochs may be kept as the best one.
        prepare: run before the phase with the model and the training data by task, batches
            ``(x, y)`` on the model's device, for data-dependent initialisation or saliency.
        required: whether ``prepare`` also runs at the end of a run that stops before the phase.
        each_epoch: run before each of its epochs with the model, the tasks in the phase, the
            epoch's number within the phase, from 0, and the phase's epochs; for schedules of what
            adapters hold in buffers.
        transition: run at its end (or every ``every`` steps) with the model, the own tensors by
            task and their gradients, for instance to drop and grow a mask.
        every: steps between transitions or reviews, or None for once at the end.
        review: run when a transition would be, with the model and what the step saw, in grad mode,
            for what needs the data or the losses of single tasks, such as growing a mask; it
            returns tensors of which the optimiser forgets what it remembers, or None if it has
            changed nothing.
        loss_limit: a task whose loss in a step is over it, or not a number, does not count in that
            step, and `review` is told of it.

    Raises:
        PlanError: turns are given together with what they replace.
    """

    name: str
    epochs: int | None = None
    share: float = 1.0
    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    heads: bool = True
    penalty: float = 1.0
    data: tuple[float, float] = (0.0, 1.0)
    turns: tuple[Turn, ...] = ()
    restart: bool = False
    selectable: bool = True
    prepare: Callable[[MultiTaskModel, Mapping[str, Iterable[Any]]], None] | None = None
    required: bool = False
    each_epoch: Callable[[MultiTaskModel, tuple[str, ...], int, int], None] | None = None
    transition: (
        Callable[
            [
                MultiTaskModel,
                Mapping[str, Mapping[str, Tensor]],
                Mapping[str, Mapping[str, Tensor | None]],
            ],
            None,
        ]
        | None
    ) = None
    every: int | None = None
    review: Callable[[MultiTaskModel, Taken], Iterable[Tensor] | None] | None = None
    loss_limit: float | None = None

    def __post_init__(self) -> None:
        if self.turns and self._whole != Turn(self.name):
            raise PlanError(
                f"Phase '{self.name}' has turns; say in them what trains, on which data and at "
                "which price, not in the phase."
            )

    @property
    def _whole(self) -> Turn:
        return Turn(self.name, self.train, self.freeze, self.heads, self.penalty, self.data)

    @property
    def parts(self) -> tuple[Turn, ...]:
        """The turns of each epoch; one over all of it if none were given."""
        return self.turns or (self._whole,)

    def trains(self, key: str) -> bool:
        """Whether the tensor of this key trains in some part of this phase."""
        return any(part.trains(key) for part in self.parts)

    def keeps(self, key: str) -> bool:
        """Whether the tensor of this key stays as it is when the phase starts again."""
        return _matches(key, self.freeze)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Group:
    """An optimiser group that a plan recommends; the first group that matches a key takes it.

    Args:
        match: patterns (shell style) of keys.
        lr: factor on the learning rate.
        decay: whether weight decay applies.
    """

    match: tuple[str, ...]
    lr: float = 1.0
    decay: bool = True

    def takes(self, key: str) -> bool:
        """Whether the tensor of this key belongs to the group."""
        return _matches(key, self.match)


def _frozen(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@dataclass(frozen=True, eq=False)
class Sharing:
    """A plan. What it does not list is shared and frozen.

    Args:
        method: the method's name.
        options: the method's options, plain values, for files and reports.
        patches: by base tensor name, how a task changes that tensor.
        adapters: by site (module name), what is inserted there.
        created: shared tensors that the plan adds, by key.
        train_shared: names of base tensors that train for all tasks together.
        penalties: charges added to the loss once a step.
        phases: the stretches of training, in order.
        groups: recommended optimiser groups.
        refused: sites that the method was asked for and left out, with the reason.
        masked: those of ``train_shared`` of which only some entries train; the others are zero. A
            created tensor says which, see `weft.core.masks`.
        head_buffers: buffers that a task owns for every weight of the layers of its head, "keep"
            for a mask; see `weft.core.masks`.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[str, Patch] = field(default_factory=dict)
    adapters: Mapping[str, Insertion] = field(default_factory=dict)
    created: Mapping[str, Created] = field(default_factory=dict)
    train_shared: frozenset[str] = frozenset()
    penalties: tuple[Penalty, ...] = ()
    phases: tuple[Phase, ...] = (Phase("train"),)
    groups: tuple[Group, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()
    head_buffers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("options", "patches", "adapters", "created", "refused"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies do not pickle; the constructor makes them anew.
        values = (
            self.method,
            dict(self.options),
            dict(self.patches),
            dict(self.adapters),
            dict(self.created),
            self.train_shared,
            self.penalties,
            self.phases,
            self.groups,
            dict(self.refused),
            self.masked,
            self.head_buffers,
        )
        return (Sharing, values)

    @property
    def trains_shared(self) -> bool:
        """Whether training a task under this plan changes tensors that other tasks use."""
        return (
            bool(self.train_shared)
            or any(c.trains for c in self.created.values())
            or any(insertion.trains_shared for insertion in self.adapters.values())
        )

    @property
    def only_owns(self) -> bool:
        """Whether tasks under this plan own tensors and change nothing that is shared."""
        return not self.created and not self.trains_shared
