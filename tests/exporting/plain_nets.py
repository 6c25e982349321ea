"""Networks of PyTorch alone, to be imported where weft is not installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block around a depthwise convolution, with a convolution around it if it grows."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inner, 2 * inner, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * inner)
        self.depthwise = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner, bias=False)
        self.project = nn.Conv2d(2 * inner, outer, 1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.norm(self.expand(x)).relu())) + self.shortcut(x)


class Small(nn.Module):
    """A small network that every method takes: norms, depthwise convolutions, residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 8), Block(8, 8))

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.norm(self.stem(image)).relu()).flatten(2).mean(2)


class Bare(nn.Module):
    """No normalisation, and layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.second = nn.Conv2d(6, 8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(self.first(image).relu()).flatten(2).mean(2)


class Tied(nn.Module):
    """Embedding and output are one tensor; inputs by keyword, in another order than they go in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids))) * scale[:, None, None]
        if mask is not None:
            x = x * mask[..., None]
        return self.out(x.mean(1))


class Handing(Small):
    """Hands its blocks more than their input, as transformers do with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Masked(6, 6) for _ in range(3))
        self.blocks.append(Masked(6, 8))

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stem(image)).relu()
        for block in self.blocks:
            x = block(x, None, scale=1.0)
        return x.flatten(2).mean(2)


class Masked(Block):
    """A block that takes a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return super().forward(x * scale if mask is None else x * mask)


NETS = {"Handing": Handing, "Small": Small, "Bare": Bare, "Tied": Tied}
