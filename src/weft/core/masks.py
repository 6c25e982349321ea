"""Masks: the entries of a weight that train; the others are zero and stay so.

A mask does not take part in composition: its zeros are in the weight itself, which all tasks use
as it is, so that whatever runs, folds, mixes or exports a task knows nothing of masks. A mask is a
bound on training, as a frozen tensor is, entry by entry: `weft.fit` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .sites import layer_weights, named_tensors

if TYPE_CHECKING:
    from .model import MultiTaskModel

KEEP = "keep"
"""The buffer that is a mask: bool, shaped as its weight, True where the weight trains."""


def shared_key(name: str, buffer: str = KEEP) -> str:
    """The key of a created buffer that belongs to a weight of the base."""
    return f"{name}:{buffer}"


def head_key(name: str, buffer: str = KEEP) -> str:
    """The key of a task's own buffer that belongs to a weight of its head."""
    return f"head:{name}:{buffer}"


def new_buffer(weight: Tensor, buffer: str) -> Tensor:
    """A mask of ones, or zeros like the weight for any other buffer."""
    if buffer == KEEP:
        return torch.ones_like(weight, dtype=torch.bool)
    return torch.zeros_like(weight)


def head_weights(head: nn.Module | None) -> dict[str, nn.Parameter]:
    """The weights of the layers of a head, by name."""
    names = set() if head is None else set(layer_weights(head))
    parameters = [] if head is None else head.named_parameters()
    return {name: parameter for name, parameter in parameters if name in names}


def head_buffers(head: nn.Module | None, buffers: Iterable[str]) -> dict[str, Tensor]:
    """The buffers that a task owns for its new head, by key."""
    return {
        head_key(name, buffer): new_buffer(weight.detach(), buffer)
        for buffer in buffers
        for name, weight in head_weights(head).items()
    }


def masked(model: MultiTaskModel, tasks: Iterable[str]) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights with a mask that train when these tasks are fitted, each with its mask."""
    names = [task for task in tasks if model.plan(task) is model.sharing]
    tensors = dict(named_tensors(model.base))
    pairs = [(tensors[n], model.shared[shared_key(n)]) for n in model.sharing.masked if names]
    for task in names if KEEP in model.sharing.head_buffers else []:
        own = model.tasks[task].own
        pairs += [(w, own[head_key(n)]) for n, w in head_weights(model.head(task)).items()]
    return [(weight, mask) for weight, mask in pairs if isinstance(weight, nn.Parameter)]
