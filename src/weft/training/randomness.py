"""Random numbers: derived seeds, streams apart from each other, and the caller's left alone."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


class Streams:
    """Random numbers for the data of each task, apart from each other and from the model's.

    Args:
        seeds: by task, where its stream starts.
    """

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self._states: dict[str, tuple[Any, ...]] = {}
        self._current: str | None = None
        outside = _state()
        for task, seed in seeds.items():
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            self._states[task] = _state()
        _set_state(outside)

    @contextmanager
    def of(self, task: str) -> Iterator[None]:
        """Draw from the task's stream in this block.

        numpy and random stay with the task until another one draws: models draw from torch only,
        and putting their states back and forth for every batch would cost more than small steps do.
        """
        if self._current != task:
            if self._current is not None:
                torch_state, *_ = self._states[self._current]
                self._states[self._current] = (torch_state, *_state()[1:])
            np.random.set_state(self._states[task][1])
            random.setstate(self._states[task][2])
            self._current = task
        outside = torch.get_rng_state()
        torch.set_rng_state(self._states[task][0])
        try:
            yield
        finally:
            self._states[task] = (torch.get_rng_state(), *self._states[task][1:])
            torch.set_rng_state(outside)
