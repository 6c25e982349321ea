"""Own tensors in half precision: half the memory, cast to the base's type when composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.core.patch import Patch, Replace
from weft.core.state import TaskState, TensorTable


def halvable(patches: Mapping[str, Patch]) -> frozenset[str]:
    """Keys of the own tensors that stand in the place of a base tensor as they are.

    Others go through a computation of their own first and keep their precision.
    """
    plain = {n: p for n, p in patches.items() if isinstance(p, Replace)}
    return frozenset(key for name, patch in plain.items() for key in patch.keys(name))


@torch.no_grad()
def halve(state: TaskState) -> None:
    """Hold a task's own tensors in half precision, where their values fit into its range.

    Args:
        state: the task; its head stays as it is.
    """
    own = state.own.to_dict()
    for key in halvable(state.patches):
        tensor = own[key]
        if not tensor.is_floating_point() or tensor.element_size() <= 2:
            continue
        half = tensor.detach().to(torch.float16)
        if half.isfinite().all():
            is_parameter = isinstance(tensor, nn.Parameter)
            own[key] = nn.Parameter(half, requires_grad=False) if is_parameter else half
    state.own = TensorTable(own)


def relative_error(found: Any, exact: Any) -> float:
    """The largest difference of two outputs, relative to the largest value of the exact one.

    Args:
        found: tensors in any structure.
        exact: tensors in the same structure.
    """
    errors = [0.0]
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(exact), strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            largest = float(b.abs().max())
            difference = float((a - b).abs().max())
            errors.append(difference / largest if largest else difference)
    return max(errors)
