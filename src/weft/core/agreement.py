"""Whether two ways to compute the same agree."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

AGREEMENT = {
    torch.float64: 1e-9,
    torch.float32: 3e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
    torch.complex128: 1e-9,
    torch.complex64: 3e-4,
}
"""What may differ by rounding, relative to the largest number."""


def agree(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    mine, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(mine) == len(theirs) and all(map(_close, mine, theirs))


def difference(one: Tensor, other: Tensor, *, floor: float = 0.0) -> float:
    """How far two tensors are apart, relative to the largest number of the second one.

    Infinite where they differ in shape, type or in where they are not finite.

    Args:
        one: a tensor.
        other: what it is compared with.
        floor: what the largest number counts as at least.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, other) else math.inf
    finite = other.isfinite()
    if not torch.allclose(one[~finite], other[~finite], equal_nan=True):
        return math.inf
    one, other = one[finite], other[finite]
    if not one.numel():
        return 0.0
    apart, largest = float((one - other).abs().max()), max(float(other.abs().max()), floor)
    if apart == 0.0:
        return 0.0
    return apart / largest if largest and math.isfinite(apart) else math.inf


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    return difference(one, other) <= AGREEMENT.get(one.dtype, 0.1)
