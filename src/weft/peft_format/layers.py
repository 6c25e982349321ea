"""How PEFT keeps the two factors of a layer, and which layers it computes otherwise."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weft.adapters.low_rank import is_linear
from weft.errors import PlanError

PREFIX = "base_model.model."
"""Starts every name in PEFT's files."""

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
FACTORS = tuple(f".{name}" for name in (*LINEAR, *EMBEDDING))
"""How names of factors end."""


@singledispatch
def refusal(layer: nn.Module) -> str:
    """Why a layer of PEFT is not the same as ours, or ""."""
    return "" if is_linear(layer) else f"PEFT has no low rank for {type(layer).__name__}"


@refusal.register
def _(layer: nn.Embedding) -> str:  # noqa: ARG001
    return ""


@refusal.register
def _(layer: nn.MultiheadAttention) -> str:  # noqa: ARG001
    return "PEFT counts the low rank of attention's output projection twice (peft#3774)"


@refusal.register
def _(layer: _ConvNd) -> str:
    if any(step != 1 for step in layer.dilation):
        return "PEFT runs its branch without the layer's dilation"
    if layer.padding_mode != "zeros":
        return f"PEFT pads its branch with zeros, the layer pads '{layer.padding_mode}'"
    return ""


@refusal.register
def _(layer: _ConvTransposeNd) -> str:
    return f"PEFT has no low rank for {type(layer).__name__}"


@singledispatch
def groups_of(layer: nn.Module) -> int:  # noqa: ARG001
    """Into how many groups the channels of a layer are divided."""
    return 1


@groups_of.register
def _(layer: _ConvNd) -> int:
    return layer.groups


@singledispatch
def names(layer: nn.Module) -> tuple[str, str]:  # noqa: ARG001
    """What PEFT calls the two factors."""
    return LINEAR


@names.register
def _(layer: nn.Embedding) -> tuple[str, str]:  # noqa: ARG001
    return EMBEDDING


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@singledispatch
def shapes(layer: Any, r: int) -> Shapes:
    """The shapes of PEFT's two factors of rank r."""
    inputs, outputs = layer.weight.shape  # of transformers, where it is (in, out)
    return (r, inputs), (outputs, r)


@shapes.register
def _(layer: nn.Linear, r: int) -> Shapes:
    return (r, layer.in_features), (layer.out_features, r)


@shapes.register
def _(layer: nn.Embedding, r: int) -> Shapes:
    return (r, layer.num_embeddings), (layer.embedding_dim, r)


@shapes.register
def _(layer: _ConvNd, r: int) -> Shapes:
    down = (r, layer.in_channels, *layer.kernel_size)
    return down, (layer.out_channels, r // layer.groups, *(1 for _ in layer.kernel_size))


@singledispatch
def to_peft(layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The factors in PEFT's shapes."""
    return a, b


@to_peft.register
def _(layer: _ConvNd, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    groups, inputs = layer.groups, layer.in_channels // layer.groups
    # PEFT's A reads all channels; that of a grouped convolution is zero outside its groups.
    wide = a.new_zeros(a.shape[0], layer.in_channels, *layer.kernel_size)
    rank = a.shape[0] // groups
    for group in range(groups):
        rows, columns = _block(group, rank), _block(group, inputs)
        wide[rows, columns] = a[rows].reshape(rank, inputs, *layer.kernel_size)
    return wide, b.reshape(layer.out_channels, rank, *(1 for _ in layer.kernel_size))


@singledispatch
def from_peft(layer: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The factors in our shapes.

    Raises:
        PlanError: the branch mixes groups of channels, which the layer itself does not.
    """
    return a, b


@from_peft.register
def _(layer: _ConvNd, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    groups, inputs = layer.groups, layer.in_channels // layer.groups
    if groups == 1:
        return a, b
    rank = a.shape[0] // groups
    own = torch.cat([a[_block(i, rank), _block(i, inputs)] for i in range(groups)])
    if not (to_peft(layer, own, b)[0] == a).all():
        raise PlanError(
            "its branch mixes channels of different groups, which no grouped convolution does"
        )
    return own, b


def _block(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)
