"""Low-rank adapters in activation form, y + scale * B(A(dropout(x))), by the kind of the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, final

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weft.core.adapter import Adapter, Insertion
from weft.core.channels import is_plain
from weft.errors import PlanError

from .low_rank_adapter import Branch, LowRankAdapter, Start
from .low_rank_convolutions import LowRankConvolution, LowRankTransposed
from .low_rank_layers import LowRankEmbedding, LowRankLinear

TURNED = ("transformers.pytorch_utils.Conv1D",)
"""Classes of other libraries that are linear layers and keep their weight as (in, out)."""


@final
@dataclass(frozen=True)
class LowRank(Insertion):
    """Inserts y = layer(x) + scale * B(A(dropout(x))) with A and B of a task's own.

    Source: Hu et al., LoRA, ICLR 2022, section 4.1.

    Args:
        r: the rank, 1 or more; of a grouped convolution, r / groups rounded up in each group.
        alpha: the branch counts alpha / r.
        dropout: probability with which an input of the branch is dropped in training, in [0, 1).
        rslora: whether it counts alpha / sqrt(r) instead.
        start: how A starts.
        common: whether a second such branch, of tensors that train for all tasks, runs beside it.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    start: Start = "kaiming"
    common: bool = False

    @property
    def trains_shared(self) -> bool:
        return self.common

    @property
    def scale(self) -> float:
        """The factor on the branch."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def build(self, site: nn.Module) -> Adapter:
        """The adapter for a linear layer, a convolution or an embedding.

        Raises:
            PlanError: a low-rank branch would not be right at such a module.
        """
        if not takes(site):
            raise PlanError(
                "LowRank stands at linear layers, convolutions and embeddings of torch.nn whose "
                f"weight is a floating point parameter; found {type(site).__name__}."
            )
        return _adapter(site, Branch(self.r, self.scale, self.dropout, self.start, self.common))


def takes(site: nn.Module) -> bool:
    """Whether a branch beside the module is the same as a change of its weight.

    It is not where a class of another library does more than its base class.
    """
    weight = site._parameters.get("weight")
    known = is_plain(site) or is_turned(site)
    return known and weight is not None and weight.is_floating_point() and _adaptable(site)


@singledispatch
def is_linear(site: nn.Module) -> bool:
    """Whether a module is a linear layer, of PyTorch or of transformers."""
    return is_turned(site)


@is_linear.register
def _(site: nn.Linear) -> bool:  # noqa: ARG001
    return True


def is_turned(site: nn.Module) -> bool:
    """Whether a module is a linear layer that keeps its weight as (in, out)."""
    return f"{type(site).__module__}.{type(site).__qualname__}" in TURNED


@singledispatch
def _adaptable(site: nn.Module) -> bool:
    return is_linear(site)


@_adaptable.register
def _(site: _ConvNd) -> bool:  # noqa: ARG001
    return True


@_adaptable.register
def _(site: nn.Embedding) -> bool:
    # The one would renormalise the sum, the other counts tokens of the whole batch.
    return site.max_norm is None and not site.scale_grad_by_freq


@singledispatch
def _adapter(site: Any, branch: Branch) -> LowRankAdapter:
    inputs, outputs = site.weight.shape
    return LowRankLinear(inputs, outputs, branch, site.weight, turned=True)


@_adapter.register
def _(site: nn.Linear, branch: Branch) -> LowRankAdapter:
    return LowRankLinear(site.in_features, site.out_features, branch, site.weight)


@_adapter.register
def _(site: nn.Embedding, branch: Branch) -> LowRankAdapter:
    tokens, features = site.weight.shape
    return LowRankEmbedding(tokens, features, site.padding_idx, branch, site.weight)


@_adapter.register
def _(site: _ConvNd, branch: Branch) -> LowRankAdapter:
    return LowRankConvolution(site, branch)


@_adapter.register
def _(site: _ConvTransposeNd, branch: Branch) -> LowRankAdapter:
    return LowRankTransposed(site, branch)
