"""Whether two ways to compute the same agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

AGREEMENT = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""What may differ by rounding, relative to the largest number."""


def agree(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    mine, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(mine) == len(theirs) and all(map(_close, mine, theirs))


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    allowed = AGREEMENT.get(one.dtype, 0.1) * float(other.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)
