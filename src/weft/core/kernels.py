"""Layers that compute rows of different tasks by one kernel, each row with its task's tensors.

This file, `sites` and `channels` are the places that look at layer types. A kernel is chosen for
what differs between tasks in a layer; the rest of the layer stays bound as ever. How many functions
run does not depend on how many tasks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .channels import is_plain

Own = Mapping[str, Tensor]
"""By attribute of the layer, the tasks' tensors, (rows, *shape): for each row that of its task."""

Kernel = Callable[..., Any]
"""A function of the layer, own tensors and its arguments, rows first: what the layer gives."""


def kernel_for(layer: nn.Module, own: frozenset[str]) -> Kernel | None:
    """The kernel of a layer whose tensors of these attributes differ between tasks.

    Args:
        layer: in eval mode; its slots may be empty.
        own: attributes.

    Returns:
        None if the layer has to run task by task.
    """
    return _kernel(layer, own)


def copies_weights(layer: nn.Module, own: frozenset[str]) -> bool:
    """Whether the kernel of a layer needs a matrix for every row, and not only vectors."""
    return "weight" in own and _multiplies(layer)


@singledispatch
def _kernel(layer: nn.Module, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return None


@singledispatch
def _multiplies(layer: nn.Module) -> bool:  # noqa: ARG001
    return False


@_kernel.register
def _(layer: _BatchNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _batch_norm if layer.track_running_stats else None


def _batch_norm(layer: _BatchNorm, own: Own, x: Tensor) -> Tensor:
    """In eval mode rows and channels are alike: (rows, C, ...) as (1, rows C, ...).

    The layer itself runs, so that a class of another library also activates what it normalised.
    """
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if last and is_plain(layer):
        return _scaled(layer, own, x)
    rows, channels = x.shape[:2]
    names = ("running_mean", "running_var", "weight", "bias")
    slots = {name: _table(layer, name) for name in names}
    before = {name: table.get(name) for name, table in slots.items()}
    for name, table in slots.items():
        shared = before[name]
        if name in own:
            table[name] = own[name].reshape(-1)
        elif shared is not None:
            table[name] = shared.repeat(rows)
    try:
        y: Tensor = layer(x.reshape(1, rows * channels, *x.shape[2:])).view(x.shape)
    finally:
        for name, table in slots.items():
            table[name] = before[name]
    return y.contiguous(memory_format=torch.channels_last) if last else y


def _table(layer: nn.Module, name: str) -> dict[str, Any]:
    """Where a layer holds a tensor."""
    buffers: dict[str, Any] = layer._buffers
    return buffers if name.startswith("running") else layer._parameters


def _scaled(layer: _BatchNorm, own: Own, x: Tensor) -> Tensor:
    """The same as one scale and one shift, which keeps the order of memory (channels last)."""
    mean, var, weight, bias = (
        own[name] if name in own else getattr(layer, name)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = (var + layer.eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(_wide(shift), x, _wide(scale))


def _wide(each: Tensor) -> Tensor:
    """(rows, C) or (C,) over places."""
    return each[..., None, None]


@_kernel.register
def _(layer: nn.LayerNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _layer_norm if is_plain(layer) else None


def _layer_norm(layer: nn.LayerNorm, own: Own, x: Tensor) -> Tensor:
    y = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    places = x.dim() - 1 - len(layer.normalized_shape)
    return _affine(y, own, layer.weight, layer.bias, places)


@_kernel.register
def _(layer: nn.RMSNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _rms_norm if is_plain(layer) else None


def _rms_norm(layer: nn.RMSNorm, own: Own, x: Tensor) -> Tensor:
    y = F.rms_norm(x, list(layer.normalized_shape), None, layer.eps)
    return _affine(y, own, layer.weight, None, x.dim() - 1 - len(layer.normalized_shape))


def _affine(y: Tensor, own: Own, weight: Tensor | None, bias: Tensor | None, places: int) -> Tensor:
    """y * weight + bias, with ``places`` axes between the rows and the features."""

    def each(name: str, shared: Tensor | None) -> Tensor | None:
        tensor = own.get(name)
        if tensor is None:
            return shared
        return tensor.view(len(tensor), *(1,) * places, *tensor.shape[1:])

    w, b = each("weight", weight), each("bias", bias)
    if w is not None and b is not None:
        return torch.addcmul(b, y, w)
    return y if w is None else y * w


@_kernel.register
def _(layer: nn.GroupNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _group_norm if is_plain(layer) else None


def _group_norm(layer: nn.GroupNorm, own: Own, x: Tensor) -> Tensor:
    """Groups never cross rows: (rows, C, ...) as (1, rows C, ...)."""
    rows, channels = x.shape[:2]

    def each(name: str) -> Tensor:
        tensor = own.get(name)
        shared: Tensor = getattr(layer, name)
        return shared.repeat(rows) if tensor is None else tensor.reshape(-1)

    wide = x.reshape(1, rows * channels, *x.shape[2:])
    y = F.group_norm(wide, rows * layer.num_groups, each("weight"), each("bias"), layer.eps)
    return y.view(x.shape)


@_kernel.register
def _(layer: nn.Linear, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _linear if is_plain(layer) else None


@_multiplies.register
def _(layer: nn.Linear) -> bool:  # noqa: ARG001
    return True


def _linear(layer: nn.Linear, own: Own, x: Tensor) -> Tensor:
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None:
        y = F.linear(x, layer.weight)
    else:
        y = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), weight.transpose(1, 2))
        y = y.view(*x.shape[:-1], y.shape[-1])
    if bias is not None:
        return y + bias.view(len(bias), *(1,) * (y.dim() - 2), -1)
    shared: Tensor | None = layer.bias
    return y if shared is None else y + shared


@_kernel.register
def _(layer: _ConvNd, own: frozenset[str]) -> Kernel | None:
    return _shifted if own == {"bias"} and is_plain(layer) else None


def _shifted(layer: _ConvNd, own: Own, x: Tensor) -> Tensor:
    """A convolution whose bias alone differs runs without it."""
    parameters: dict[str, Any] = layer._parameters
    before, parameters["bias"] = parameters["bias"], None
    try:
        y: Tensor = layer(x)
    finally:
        parameters["bias"] = before
    return y + own["bias"].view(*own["bias"].shape, *(1,) * (y.dim() - 2))
