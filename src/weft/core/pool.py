"""Pools: structures to lease, one at a time, safe under threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .adapter import Insertion
from .structure import Structure


class Pool:
    """Structures with the same adapters.

    Args:
        base: the model's own base, copied without its tensors.
        adapters: what is inserted, by site.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Insertion]) -> None:
        self._base = base
        self._adapters = adapters
        first = Structure(base, adapters)
        self.adapter_names = first.adapter_names
        self.adapter_buffers = first.adapter_buffers
        # No lock: a view that is collected gives its structure back at any moment, also in the
        # middle of `acquire`. A deque's single operations are safe.
        self._idle = deque([first])

    def acquire(self) -> Structure:
        """A structure that no forward, backward or view is using."""
        for _ in range(len(self._idle)):
            try:
                structure = self._idle.pop()
            except IndexError:
                break
            if not structure.busy:
                return structure
            self._idle.appendleft(structure)
        return Structure(self._base, self._adapters)

    def release(self, structure: Structure) -> None:
        """Give a structure back; it is used again once its backward has run."""
        if not structure.busy:
            structure.unbind()
        self._idle.append(structure)

    def sweep(self) -> None:
        """Empty the structures whose backward has run since they came back."""
        for _ in range(len(self._idle)):
            try:
                structure = self._idle.popleft()
            except IndexError:
                break
            self.release(structure)

    @contextmanager
    def lease(self) -> Iterator[Structure]:
        """A structure for the length of a ``with`` block."""
        structure = self.acquire()
        try:
            yield structure
        finally:
            self.release(structure)
