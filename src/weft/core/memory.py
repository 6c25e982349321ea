"""Tensors as memory: where they are, and what is in them."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """The place of the memory that a tensor looks at; the same for all its views."""
    address: int = tensor.untyped_storage()._cdata
    return address


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, in order, from any device and layout."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
