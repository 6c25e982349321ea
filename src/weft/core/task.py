"""Tasks: a head, a loss and a metric under a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from weft.errors import TaskError

LONGEST_NAME = 200


@runtime_checkable
class Metric(Protocol):
    """What weft needs of a metric; every torchmetrics metric has it."""

    def update(self, output: Any, target: Any, /) -> None:
        """Take in one batch."""

    def compute(self) -> Any:
        """The value over all batches since the last reset."""

    def reset(self) -> None:
        """Forget all batches."""


Metrics = Mapping[str, Metric]


@dataclass(frozen=True, eq=False)
class Task:
    """What to do with the base's output for one task.

    Args:
        head: a module on the base's output; or a function from one batch of that output to such a
            module, for heads that are sized by a dry run; or None for the output itself.
        loss: function of (output, target) to a scalar.
        metric: a metric, or metrics by name of which the first one chooses the best epoch.
            Metrics are copied before use. Larger is better unless the metric's
            ``higher_is_better`` is False.
        check: function of (output, target) that raises `weft.errors.DataError` for targets that
            the task cannot take; called on every batch before the loss.
        taps: whether the head also reads the side sites: ``head(output, {site: feature})``.
        spec: plain values from which a built-in task comes back; None for tasks of one's own.
        classes: names of the classes, if there are any.
    """

    head: nn.Module | Callable[[Tensor], nn.Module] | None
    loss: Callable[[Any, Any], Tensor]
    metric: Metric | Metrics = field(default_factory=dict)
    check: Callable[[Any, Any], None] | None = None
    taps: bool = False
    spec: Mapping[str, Any] | None = None
    classes: tuple[str, ...] | None = None

    @property
    def metrics(self) -> Metrics:
        """The task's metrics by name; a single metric goes by its class's name."""
        if isinstance(self.metric, Mapping):
            return self.metric
        name = type(self.metric).__name__
        return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): self.metric}


def check_task_name(name: str, existing: Mapping[str, Any]) -> None:
    """Refuse names that are taken or that could not be a folder's name everywhere.

    Raises:
        TaskError: says what is wrong with the name.
    """
    if not isinstance(name, str) or not name:
        raise TaskError(f"A task's name is a string that is not empty, found {name!r}.")
    if len(name) > LONGEST_NAME:
        raise TaskError(f"A task's name has at most {LONGEST_NAME} characters, found {len(name)}.")
    bad = sorted({c for c in name if c in '/\\:*?"<>|' or not c.isprintable()})
    if bad or name.startswith(".") or name != name.strip() or name.endswith("."):
        reason = (
            f"contains {', '.join(map(repr, bad))}" if bad else "starts or ends with a dot or space"
        )
        raise TaskError(
            f"'{name}' cannot be a task's name: it {reason}. "
            "Names become folders of a bank; use letters, digits, spaces, '-', '_' and inner dots."
        )
    if name in existing:
        raise TaskError(
            f"Task '{name}' exists already. Remove it first: model.remove_task({name!r})."
        )


def check_task(task: Task) -> None:
    """Refuse what is no task, for instance a bare head.

    Raises:
        TaskError: says what was found.
    """
    if not isinstance(task, Task):
        raise TaskError(
            "A task is made by weft.Classification, weft.Regression or the like, or by "
            f"weft.Task(head=..., loss=..., metric=...); found {type(task).__name__}."
        )
