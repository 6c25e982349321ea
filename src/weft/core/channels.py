"""The output channels of layers: how many, where, and how a number per channel meets the weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Channels:
    """The output channels of a layer.

    Args:
        count: how many.
        axis: of the output, where they are: 1 for (rows, C, ...), -1 for (..., C).
    """

    count: int
    axis: int


@singledispatch
def output_channels(layer: nn.Module) -> Channels | None:  # noqa: ARG001
    """The output channels of a layer, or None if they are not known."""
    return None


@output_channels.register
def _(layer: nn.Linear) -> Channels:
    return Channels(layer.out_features, axis=-1)


@output_channels.register
def _(layer: _ConvNd) -> Channels:
    return Channels(layer.out_channels, axis=1)


@output_channels.register
def _(layer: _NormBase) -> Channels | None:
    # A class of another library may activate what it has normalised.
    return Channels(layer.num_features, axis=1) if is_plain(layer) else None


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is PyTorch's own: it does nothing else, before or after."""
    return type(layer).__module__.startswith("torch.nn.modules.")


@singledispatch
def per_weight(layer: Any, scale: Tensor) -> Tensor:
    """The scale of each output channel, in a shape that broadcasts over the layer's weight."""
    return scale.view(-1, *(1,) * (layer.weight.dim() - 1))


@per_weight.register
def _(layer: _ConvTransposeNd, scale: Tensor) -> Tensor:
    # (in, out / groups, ...): the inputs of each group lead to outputs of that group.
    inputs, outputs, *kernel = layer.weight.shape
    by_group = scale.view(layer.groups, 1, outputs).expand(-1, inputs // layer.groups, -1)
    return by_group.reshape(inputs, outputs, *(1 for _ in kernel))
