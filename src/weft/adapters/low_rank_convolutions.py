"""Low-rank adapters of convolutions: A has the convolution's own geometry, B is 1x1.

In each of the convolution's groups the branch has a rank of its own, r / groups rounded up, so that
B A is a weight of the same grouped convolution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .low_rank_adapter import Branch, LowRankAdapter

_FORWARD: Any = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _OfConvolution(LowRankAdapter, ABC):
    """What both directions have in common.

    Args:
        layer: the convolution; its geometry is taken over.
        down: the shape of A.
        rank: of each group.
        branch: the rest.
    """

    def __init__(self, layer: _ConvNd, down: tuple[int, ...], rank: int, branch: Branch) -> None:
        places = len(layer.kernel_size)
        inputs = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        a = branch.reducing(down, inputs, layer.weight)
        b = layer.weight.new_zeros(layer.out_channels, rank, *(1,) * places)
        super().__init__(a, b, branch)
        self._places = places
        self._groups = layer.groups
        self._stride, self._dilation = layer.stride, layer.dilation

    @abstractmethod
    def reduced(self, x: Tensor, a: Tensor, groups: int, y: Tensor) -> Tensor:
        """A(x), (rows, groups * rank of each, ...), for an output like y."""

    def reduced_rows(self, x: Tensor, a: Tensor, y: Tensor) -> Tensor:
        """A(x) for a factor (rows, *shape) of each row, row by row and group by group."""
        # The rows are further groups of one row.
        wide = x.reshape(1, -1, *x.shape[2:])
        return self.reduced(wide, a.reshape(-1, *a.shape[2:]), x.shape[0] * self._groups, y)

    def added(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = self.reduced(x, a, self._groups, y)
        scaled = b if self.scale == 1.0 else b * self.scale
        delta: Tensor = _FORWARD[self._places - 1](h, scaled, groups=self._groups)
        return y + delta

    def added_rows(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        parts, rank = x.shape[0] * self._groups, b.shape[2]
        h = self.reduced_rows(x, a, y).reshape(parts, rank, -1)
        delta = torch.bmm(b.reshape(parts, -1, rank), h)
        return torch.add(y, delta.view(y.shape), alpha=self.scale)


@final
class LowRankConvolution(_OfConvolution):
    """The adapter of a convolution: A is (groups * rank, in / groups, *kernel).

    Args:
        layer: the convolution; its geometry is taken over.
        branch: its rank and the rest.
    """

    def __init__(self, layer: _ConvNd, branch: Branch) -> None:
        rank = -(-branch.r // layer.groups)
        down = (rank * layer.groups, layer.in_channels // layer.groups, *layer.kernel_size)
        super().__init__(layer, down, rank, branch)
        self._mode = layer.padding_mode
        self._edges = list(layer._reversed_padding_repeated_twice)
        self._padding = layer.padding if self._mode == "zeros" else 0

    def reduced(self, x: Tensor, a: Tensor, groups: int, y: Tensor) -> Tensor:  # noqa: ARG002
        if self._mode != "zeros":
            x = F.pad(x, self._edges, mode=self._mode)
        run = _FORWARD[self._places - 1]
        h: Tensor = run(x, a, None, self._stride, self._padding, self._dilation, groups)
        return h

    def reduced_rows(self, x: Tensor, a: Tensor, y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().reduced_rows(x, a, y)
        # A graph for any number of rows has no convolution with as many groups.
        x = F.pad(x, self._edges, mode="constant" if self._mode == "zeros" else self._mode)
        sizes = zip(a.shape[3:], self._stride, self._dilation, strict=True)
        for place, (kernel, stride, dilation) in enumerate(sizes):
            # What the kernel meets along this axis, in a new last axis.
            x = x.unfold(2 + place, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        met = x.flatten(2, 1 + self._places).flatten(3).transpose(2, 3)
        parts, each = x.shape[0] * self._groups, math.prod(a.shape[2:])
        return torch.bmm(a.reshape(parts, -1, each), met.reshape(parts, each, -1))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        down = a.reshape(self._groups, b.shape[1], -1)
        up = b.reshape(self._groups, -1, b.shape[1])
        return torch.bmm(up, down).reshape(b.shape[0], *a.shape[1:])


@final
class LowRankTransposed(_OfConvolution):
    """The adapter of a transposed convolution: A is (in, rank, *kernel).

    Args:
        layer: the convolution; its geometry is taken over.
        branch: its rank and the rest.
    """

    def __init__(self, layer: _ConvNd, branch: Branch) -> None:
        rank = -(-branch.r // layer.groups)
        down = (layer.in_channels, rank, *layer.kernel_size)
        super().__init__(layer, down, rank, branch)
        self._padding = tuple(map(int, layer.padding))
        self._kernel = layer.kernel_size

    def reduced(self, x: Tensor, a: Tensor, groups: int, y: Tensor) -> Tensor:
        # A caller may have asked for another output size: the branch follows what the site gave.
        first = x.dim() - self._places
        last = y.dim() - self._places
        missing = [
            y.shape[last + i] - (x.shape[first + i] - 1) * s + 2 * p - d * (k - 1) - 1
            for i, (s, p, d, k) in enumerate(
                zip(self._stride, self._padding, self._dilation, self._kernel, strict=True)
            )
        ]
        run = _TRANSPOSED[self._places - 1]
        h: Tensor = run(x, a, None, self._stride, self._padding, missing, groups, self._dilation)
        return h

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        down = a.reshape(self._groups, -1, *a.shape[1:])
        up = b.reshape(self._groups, -1, b.shape[1])
        return torch.einsum("gir...,gor->gio...", down, up).flatten(0, 1)
