"""How many bytes of activations are saved for a backward at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved:
    """A saved activation; counts how many bytes of them live at once."""

    now = 0
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        Saved.now += self.size
        Saved.peak = max(Saved.peak, Saved.now)

    def __del__(self) -> None:
        Saved.now -= self.size


@contextmanager
def saved_activations() -> Iterator[type[Saved]]:
    """In this block ``peak`` of what is given is the largest number of bytes at once."""
    Saved.now = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield Saved
