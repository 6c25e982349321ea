"""Answers as plain values: what a task's output means, in names and probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from weft.core.task import Task


@final
@dataclass(frozen=True)
class Answer:
    """What one task says about one row.

    Args:
        task: its name.
        meaning: the task that ran: its kind and its classes.
        output: of its head for this row, without the axis of rows.
    """

    task: str
    meaning: Task
    output: Any


def plain_answer(answer: Answer, top: int | None) -> dict[str, Any]:
    """An answer as JSON has it.

    Args:
        answer: of one task for one row.
        top: at most so many classes, the most probable first; None for all.

    Returns:
        ``task``, ``kind``, ``classes`` (name and probability; None where the task has none) and
        ``output``; numbers that are not finite become None.
    """
    kind = (answer.meaning.spec or {}).get("kind")
    return {
        "task": answer.task,
        "kind": kind,
        "classes": _classes(answer, kind, top),
        "output": plain(answer.output),
    }


def _classes(answer: Answer, kind: str | None, top: int | None) -> list[dict[str, Any]] | None:
    output = answer.output
    if kind not in ("classification", "binary") or not isinstance(output, Tensor):
        return None
    logits = output.double().reshape(-1)
    chances = logits.softmax(0) if kind == "classification" else logits.sigmoid()
    names = answer.meaning.classes
    if names is None:
        names = tuple(f"class {i}" for i in range(len(chances))) if len(chances) > 1 else ("yes",)
    order = torch.argsort(chances, descending=True, stable=True)[:top].tolist()
    return [{"name": names[i], "probability": plain(chances[i])} for i in order]


def plain(value: Any) -> Any:
    """Tensors in any structure as nested lists; what is not finite becomes None."""
    if isinstance(value, Tensor):
        value = torch.view_as_real(value) if value.is_complex() else value
        listed = value.tolist()
        finite = not value.is_floating_point() or bool(value.isfinite().all())
        return listed if finite else _without_infinities(listed)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return _without_infinities(value) if isinstance(value, float) else value


def _without_infinities(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return value if math.isfinite(value) else None
