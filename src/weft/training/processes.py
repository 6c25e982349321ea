"""What several processes that train together have to agree on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

Value = TypeVar("Value")


class Processes:
    """The processes of a run; one that is alone talks to nobody.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process, so that all do the same."""
        if self.count == 1:
            return flag
        number = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(number, reduction="sum") > 0)

    def mean(self, values: list[float]) -> list[float]:
        """The means of numbers over the processes."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, device=self._accelerator.device)
        means: list[float] = self._accelerator.reduce(tensor, reduction="mean").tolist()
        return means

    def first(self, value: Value) -> Value:
        """The first process's value, a plain one, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process, in place."""
        if self.count > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach(), from_process=0))

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating tensors by their means over the processes, in place."""
        if self.count == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_floating_point():
                groups.setdefault(tensor.dtype, []).append(tensor)
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            mean = self._accelerator.reduce(flat, reduction="mean")
            for tensor, part in zip(group, mean.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))
