"""Low-rank adapters of linear layers and embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from .low_rank_adapter import Branch, LowRankAdapter


@final
class LowRankLinear(LowRankAdapter):
    """The adapter of a linear layer: A is (r, in), B is (out, r).

    Args:
        inputs: features of the layer's input.
        outputs: features of its output.
        turned: whether the layer keeps its weight as (in, out).
        branch: its rank and the rest.
        like: a tensor of the type and device that the factors shall have.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        branch: Branch,
        like: Tensor,
        *,
        turned: bool = False,
    ) -> None:
        a = branch.reducing((branch.r, inputs), inputs, like)
        super().__init__(a, like.new_zeros(outputs, branch.r), branch)
        self._turned = turned

    def added(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return raised(y, F.linear(x.reshape(-1, x.shape[-1]), a), b, self.scale)

    def added_rows(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide = x.reshape(x.shape[0], -1, x.shape[-1])
        return raised_rows(y, torch.bmm(wide, a.transpose(1, 2)), b, self.scale)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).t() if self._turned else b @ a


@final
class LowRankEmbedding(LowRankAdapter):
    """The adapter of an embedding: A is (r, tokens) and starts at zero, B is (features, r).

    As in PEFT, B starts normal, and nothing is dropped: the inputs are indices.

    Args:
        tokens: rows of the embedding's weight.
        features: of its output.
        padding: the token whose numbers in A never train, or None.
        branch: its rank and the rest.
        like: a tensor of the type and device that the factors shall have.
    """

    def __init__(
        self, tokens: int, features: int, padding: int | None, branch: Branch, like: Tensor
    ) -> None:
        b = torch.empty(features, branch.r).normal_().to(like.device, like.dtype)
        super().__init__(like.new_zeros(branch.r, tokens), b, replace(branch, dropout=0.0))
        self._padding = padding

    def added(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return raised(y, F.embedding(x.reshape(-1), a.t(), self._padding), b, self.scale)

    def added_rows(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        index = x.reshape(x.shape[0], 1, -1).to(torch.int64).expand(-1, a.shape[1], -1)
        found = a.gather(2, index).transpose(1, 2)
        if self._padding is not None and torch.is_grad_enabled():
            padded = (index[:, :1] == self._padding).transpose(1, 2)
            found = torch.where(padded, found.detach(), found)
        return raised_rows(y, found, b, self.scale)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).t()


def raised(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * h B^T in one pass over y.

    Args:
        y: (..., out).
        h: (places, r).
        b: (out, r).
        scale: the factor.
    """
    return torch.addmm(y.reshape(-1, b.shape[0]), h, b.t(), alpha=scale).view(y.shape)


def raised_rows(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same for factors (rows, out, r) of each row, and h (rows, places, r)."""
    wide = y.reshape(y.shape[0], -1, y.shape[-1])
    return torch.baddbmm(wide, h, b.transpose(1, 2), alpha=scale).view(y.shape)
