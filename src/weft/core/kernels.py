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


LAYER_NORMS = ("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32")
"""Classes of other libraries that compute what PyTorch's own layer does."""


def kernel_for(layer: nn.Module, own: frozenset[str]) -> Kernel | None:
    """The kernel of a layer whose tensors of these attributes differ between tasks.

    Args:
        layer: in eval mode; its slots may be empty.
        own: attributes.

    Returns:
        None if the layer has to run task by task.
    """
    if has_hooks(layer) or not own <= _VECTORS | {"weight"}:
        return None
    return _kernel(layer, own)


_VECTORS = frozenset({"bias", "running_mean", "running_var", "num_batches_tracked"})


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens around the forward of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def copies_weights(layer: nn.Module, own: frozenset[str]) -> bool:
    """Whether the kernel of a layer needs a matrix for every row, and not only vectors."""
    return "weight" in own and _multiplies(layer)


def alone(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module gives for rows of one task, without gradients.

    For one small image PyTorch does not take oneDNN's convolution, which is twice as fast here.
    """
    if is_one_image(layer, *args) and not kwargs:
        convolution: Any = layer
        x = args[0]
        return torch.mkldnn_convolution(
            x,
            convolution.weight,
            convolution.bias,
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
    return layer(*args, **kwargs)


@singledispatch
def is_one_image(layer: nn.Module, *args: Any) -> bool:  # noqa: ARG001
    """Whether a call is a plain convolution of one small image on the CPU."""
    return False


@is_one_image.register
def _(layer: nn.Conv2d, *args: Any) -> bool:
    x = args[0]
    plain = is_plain(layer) and layer.padding_mode == "zeros" and not has_hooks(layer)
    small = x.dim() == 4 and x.shape[0] == 1 and x.numel() <= 20480
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.dtype == layer.weight.dtype
    known = not isinstance(layer.padding, str) and layer.groups == 1
    usual = torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    return plain and small and fits and known and usual


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
    if is_plain(layer) and (last or torch.compiler.is_compiling()):
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
    return torch.addcmul(_over(shift, x), x, _over(scale, x))


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """(rows, C) or (C,) over the places of (rows, C, ...)."""
    return channels.reshape(*channels.shape, *(1,) * (x.dim() - 2))


@_kernel.register
def _(layer: nn.LayerNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    kind = type(layer)
    same = is_plain(layer) or f"{kind.__module__}.{kind.__qualname__}" in LAYER_NORMS
    return _layer_norm if same else None


def _layer_norm(layer: nn.LayerNorm, own: Own, x: Tensor) -> Tensor:
    y = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return _affine(y, _each(layer, own, "weight"), _each(layer, own, "bias"))


@_kernel.register
def _(layer: nn.RMSNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _rms_norm if is_plain(layer) else None


def _rms_norm(layer: nn.RMSNorm, own: Own, x: Tensor) -> Tensor:
    y = F.rms_norm(x, list(layer.normalized_shape), None, layer.eps)
    return _affine(y, _each(layer, own, "weight"), None)


def _each(layer: nn.Module, own: Own, name: str) -> tuple[bool, Tensor | None]:
    """Whether tasks differ in a tensor of a layer, and the tensor, of each row or of all."""
    return (True, own[name]) if name in own else (False, getattr(layer, name))


def _affine(
    y: Tensor, weight: tuple[bool, Tensor | None], bias: tuple[bool, Tensor | None] | None
) -> Tensor:
    """y * weight + bias, for features in the last axes of y."""

    def over(differs: bool, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not differs:
            return tensor
        places = y.dim() - tensor.dim()
        return tensor.reshape(tensor.shape[0], *(1,) * places, *tensor.shape[1:])

    w, b = over(*weight), None if bias is None else over(*bias)
    if w is not None and b is not None:
        return torch.addcmul(b, y, w)
    return y if w is None else y * w


@_kernel.register
def _(layer: nn.GroupNorm, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _group_norm if is_plain(layer) else None


def _group_norm(layer: nn.GroupNorm, own: Own, x: Tensor) -> Tensor:
    y = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    weight, bias = (own[n] if n in own else getattr(layer, n) for n in ("weight", "bias"))
    return y if weight is None else torch.addcmul(_over(bias, x), y, _over(weight, x))


@_kernel.register
def _(layer: nn.Linear, own: frozenset[str]) -> Kernel | None:  # noqa: ARG001
    return _linear if is_plain(layer) else None


@_multiplies.register
def _(layer: nn.Linear) -> bool:  # noqa: ARG001
    return True


def _linear(layer: nn.Linear, own: Own, x: Tensor) -> Tensor:
    if "weight" in own:
        wide = x.reshape(x.shape[0], -1, x.shape[-1])
        y = torch.bmm(wide, own["weight"].transpose(1, 2)).reshape(*x.shape[:-1], -1)
    else:
        y = F.linear(x, layer.weight, None if "bias" in own else layer.bias)
    if "bias" in own:
        bias = own["bias"].to(y.dtype)
        return y + bias.reshape(bias.shape[0], *(1,) * (y.dim() - 2), bias.shape[1])
    return y if "weight" not in own or layer.bias is None else y + layer.bias.to(y.dtype)


@_kernel.register
def _(layer: _ConvNd, own: frozenset[str]) -> Kernel | None:
    return _shifted if own == {"bias"} and is_plain(layer) else None


def _shifted(layer: _ConvNd, own: Own, x: Tensor) -> Tensor:
    """A convolution whose bias alone differs runs without it."""
    parameters: dict[str, Any] = layer._parameters
    held = {name: tensor for name, tensor in parameters.items() if name == "bias"}
    parameters["bias"] = None
    try:
        y: Tensor = layer(x)
    finally:
        del parameters["bias"]
        parameters.update(held)
    return y + _over(own["bias"].to(y.dtype), y)
