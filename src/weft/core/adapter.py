"""Adapters: what may be inserted into the base's structure, at a named module (a site).

An *inline* adapter stands around the call of the site: it may change the input, change the output,
or not call the site at all. A *side* adapter lets the trunk pass unchanged and records a feature
for the heads; what a task owns of it runs after the trunk, so tasks that differ only at side sites
share one trunk pass.

No adapter ever asks which task is active: the slots of its parameters are bound to one task's
tensors before each call, as the slots of the base are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Records = dict[str, dict[str, Tensor]]
"""What adapters log in one forward: ``{site: {what: tensor}}``."""


@dataclass
class Call:
    """One forward: its records, fresh for each call, and the caller's explicit context.

    Args:
        records: what the adapters of this forward have logged so far, by site.
        context: what the caller handed in (labels, a prompt), read-only by convention.
    """

    records: Records = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)


class Adapter(nn.Module, ABC):
    """A module inserted at a site, with slots for one task's tensors."""

    @abstractmethod
    def shared_names(self) -> frozenset[str]:
        """Names of this module's tensors that all tasks share; a task owns each of the others."""

    @abstractmethod
    def fold(self, site: nn.Module) -> nn.Module:
        """A plain module that equals the site with this adapter, whose slots are bound to one task.

        Raises:
            PlanError: if no plain module can, with the reason.
        """


class InlineAdapter(Adapter, ABC):
    """An adapter whose output continues through the trunk."""

    @abstractmethod
    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        """The site's new output.

        Args:
            call: records and context of this forward.
            site: the name of the site, the key for records.
            inner: the site itself; not calling it skips its computation.
            args: the positional inputs of the site.
        """


class RowwiseAdapter(InlineAdapter, ABC):
    """An inline adapter that also serves rows of different tasks at once.

    An inline adapter of another kind runs task by task where rows of several tasks meet.
    """

    @abstractmethod
    def forward_rows(
        self,
        own: Mapping[str, Tensor],
        call: Call,
        site: str,
        inner: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """The site's new output for a batch whose rows belong to different tasks.

        Args:
            own: by name, those of this module's tensors that differ between the tasks,
                (rows, *shape): for each row that of its task.
            call: records and context of this forward.
            site: the name of the site.
            inner: the site itself.
            args: the positional inputs of the site, rows first.
        """


class SideAdapter(Adapter, ABC):
    """An adapter that records a feature and never alters the trunk."""

    @abstractmethod
    def forward(self, output: Any) -> Tensor:
        """The feature to record, from the site's output, by shared tensors only."""

    @abstractmethod
    def tap(self, feature: Tensor) -> Tensor:
        """What one task's head reads, from the recorded feature, by the task's own tensors."""


class Insertion(ABC):
    """What a plan inserts at a site: frozen data that builds the adapter for that site.

    Implementations are frozen dataclasses of plain values.
    """

    @property
    def trains_shared(self) -> bool:
        """Whether its adapters hold tensors that train for all tasks together."""
        return False

    @abstractmethod
    def build(self, site: nn.Module) -> Adapter:
        """A new adapter for the site, with initial values; called anew for every task."""
