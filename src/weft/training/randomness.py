"""Random numbers: derived seeds, streams apart from each other, and the caller's left alone."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch


def derived_seed(*parts: object) -> int:
    """A seed of 32 bits that depends on all the parts."""
    return zlib.crc32(repr(parts).encode())


def seed_everything(seed: int) -> None:
    """Seed torch on all devices, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


@contextmanager
def caller_keeps_randomness(device: torch.device) -> Iterator[None]:
    """Put the generators back at the end of the block, as if nothing had been drawn in it.

    Args:
        device: a device whose generator is put back beside the processor's.
    """
    state = _state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        _set_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


class Stream:
    """Random numbers of its own: in a ``with`` block, loading draws from here.

    Args:
        seed: where the stream starts.
    """

    def __init__(self, seed: int) -> None:
        outside = _state()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self._mine = _state()
        _set_state(outside)

    def __enter__(self) -> None:
        self._outside = _state()
        _set_state(self._mine)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mine = _state()
        _set_state(self._outside)
