"""A low-rank change of a weight itself, for layers that use their weight without being called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from weft.core.patch import Patch


def common_keys(name: str) -> tuple[str, str]:
    """The keys of the factors that all tasks share for the base tensor ``name``."""
    return (f"{name}:common_A", f"{name}:common_B")


@final
@dataclass(frozen=True)
class LowRankSum(Patch):
    """W + scale * B A, with W as a matrix of its first axis by all others.

    Source: Hu et al., LoRA, ICLR 2022, section 4.1.

    Args:
        r: the rank, 1 or more.
        scale: factor on the product.
        start: how A starts: uniform within 1/sqrt(columns), or normal with a deviation of 1/r.
        common: whether a product of shared tensors, under `common_keys`, is added as well.
    """

    r: int
    scale: float
    start: Literal["kaiming", "gaussian"] = "kaiming"
    common: bool = False

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}:A", f"{name}:B")

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        rows, columns = base.shape[0], base[0].numel()
        bound = 1.0 / math.sqrt(columns)
        a = torch.empty(self.r, columns)
        a = a.uniform_(-bound, bound) if self.start == "kaiming" else a.normal_(std=1.0 / self.r)
        down, up = self.keys(name)
        a = a.to(base.device, base.dtype)
        return {down: nn.Parameter(a), up: nn.Parameter(base.new_zeros(rows, self.r))}

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        weight, pairs = base.flatten(1), [self.keys(name)]
        if self.common:
            pairs.append(common_keys(name))
        for keys in pairs:
            a, b = (tensors[key].to(base.dtype) for key in keys)
            weight = torch.addmm(weight, b, a, alpha=self.scale)
        return weight.view(base.shape)

    def harden(
        self,
        name: str,
        base: Tensor,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        return self, {key: tensors[key] for key in self.keys(name)}
