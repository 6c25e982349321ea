"""Heads and tasks: built-in ones come back from their description, others are handed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.sites import named_tensors, tensor_slots
from weft.core.task import Task
from weft.errors import BankError, TaskError
from weft.tasks import task_from_spec

from . import tensors as files_of
from .documents import plain
from .fingerprint import class_name


def encode_task(name: str, task: Task, head: nn.Module | None) -> dict[str, Any]:
    """What a bundle says about the task: its description, and what must be handed in at load.

    Args:
        name: the task's name.
        task: its description.
        head: its head, built.

    Raises:
        BankError: the head keeps state that is no tensor.
    """
    spec = None if task.spec is None else plain(dict(task.spec), f"spec of '{name}'")
    if head is not None and any(key.endswith("_extra_state") for key in head.state_dict()):
        raise BankError(
            f"The head of '{name}' keeps extra state that is no tensor (get_extra_state), which a "
            "bank cannot store. Keep it in buffers instead."
        )
    return {
        "spec": spec,
        "classes": None if task.classes is None else list(task.classes),
        "taps": task.taps,
        "head": None if head is None else class_name(head),
        "hand_in": _hand_in(task, head, spec),
    }


def _hand_in(task: Task, head: nn.Module | None, spec: Mapping[str, Any] | None) -> list[str]:
    """The parts of a task that its description does not bring back."""
    if spec is None:
        return ["loss"] if head is None else ["head", "loss"]
    own = []
    builtin = task_from_spec(spec)
    if head is not None:
        shapes = {n: tuple(t.shape) for n, t in named_tensors(head)}
        again = sized(builtin.head, shapes, foreign=False)
        if again is None or class_name(again) != class_name(head):
            own.append("head")
    return own + (["loss"] if task.loss != builtin.loss else [])


def decode_task(
    name: str, entry: Mapping[str, Any], own: Task | None, head: nn.Module | None
) -> Task:
    """The task of a bundle; its head, where it has one, is still to be filled.

    Args:
        name: the task's name.
        entry: as `encode_task` makes it.
        own: a task that was handed in.
        head: a head that was handed in.

    Raises:
        BankError: something must be handed in and was not, or was and does not fit.
    """
    if own is not None and isinstance(own.head, nn.Module) and head is not None:
        raise BankError(
            f"Two heads were handed in for '{name}': by heads= and in its task. Drop one."
        )
    if entry["head"] is None and (head is not None or (own is not None and own.head is not None)):
        raise BankError(
            f"'{name}' was saved without a head, but one was handed in. Use Task(head=None, ...)."
        )
    if own is not None:
        task = own
    elif entry["spec"] is not None:
        task = _builtin(json.dumps(entry["spec"]))
        if "loss" in entry["hand_in"]:
            task = replace(task, loss=_NotStored(name))
    else:
        classes = entry["classes"]
        known = None if classes is None else tuple(classes)
        task = Task(None, _NotStored(name), taps=entry["taps"], classes=known)
    if head is not None:
        return replace(task, head=head)
    if "head" in entry["hand_in"] and own is None:
        raise BankError(
            f"The head of '{name}' is a module of your own ({entry['head']}), of which the bank "
            f"stores only the tensors. Hand one in: bank.load(base, heads={{{name!r}: "
            f"{entry['head'].rpartition('.')[2]}(...)}}), or with loss and metric "
            f"custom_tasks={{{name!r}: weft.Task(...)}}."
        )
    return task


@lru_cache(maxsize=256)
def _builtin(spec: str) -> Task:
    """A built-in task; tasks are frozen and their metrics are copied before use."""
    return task_from_spec(json.loads(spec))


def sized(
    make: nn.Module | Callable[[Tensor], nn.Module] | None,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    foreign: bool,
) -> nn.Module | None:
    """A head built by its function for features of the size that its stored tensors tell.

    Args:
        make: function from features to the head.
        shapes: of the head's tensors, by name.
        foreign: whether the function is the user's; only built-in heads are built without values.

    Returns:
        A head with tensors of exactly these names and shapes, values still to be filled, or None
        if no size of features gives one.
    """
    if make is None or isinstance(make, nn.Module):
        return None
    for shape in _feature_shapes(shapes):
        try:
            with torch.random.fork_rng(devices=[]) if foreign else torch.device("meta"):
                head = make(torch.zeros(shape))
        except Exception:  # a function may refuse a wrong guess in any way
            continue
        if {n: tuple(t.shape) for n, t in named_tensors(head)} == dict(shapes):
            return head if foreign else head.to_empty(device="cpu")
    return None


def _feature_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for width in dict.fromkeys(shape[1] for shape in shapes.values() if len(shape) >= 2):
        yield from ((1, width), (1, width, 1, 1), (1, 1, width))


def fill_head(name: str, head: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give a head its stored tensors; ties and flattened weights stay what they are.

    Raises:
        BankError: the head has other tensors than were saved.
    """
    mine = dict(named_tensors(head))
    expected = {n: _shape(t) for n, t in stored.items()}
    found = {n: _shape(t) for n, t in mine.items()}
    if found != expected:
        raise BankError(
            f"The head handed in for '{name}' ({class_name(head)}) is not the one that was saved: "
            f"{files_of.first_difference(expected, found)}. Build it with the same sizes."
        )
    seen = set()
    for key, slots, attribute in tensor_slots(head):
        if key not in seen:
            seen.add(key)
            slots[attribute].data = stored[key].detach().to(slots[attribute].device)
            slots[attribute].requires_grad_(stored[key].requires_grad)


def _shape(tensor: Tensor) -> str:
    return f"of shape {list(tensor.shape)}"


@dataclass(frozen=True)
class _NotStored:
    """Stands for a loss of one's own, which a bank does not store."""

    task: str

    def __call__(self, output: Any, target: Any) -> Tensor:  # noqa: ARG002
        raise TaskError(
            f"The loss of '{self.task}' is a function of your own, which a bank does not store. "
            f"Hand it in: bank.load(base, custom_tasks={{{self.task!r}: weft.Task(...)}})."
        )
