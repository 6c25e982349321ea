"""A scale and a shift of a task's own for each output channel of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, Call, Insertion, RowwiseAdapter
from weft.core.channels import Channels, is_plain, output_channels, per_weight
from weft.errors import PlanError


@final
@dataclass(frozen=True)
class ChannelAffine(Insertion):
    """Inserts y = scale * layer(x) + shift, per output channel, after a layer.

    Source: Mudrakarta et al., K for the Price of 1, ICLR 2019, section 4: what stands in for the
    scale and shift of a normalisation where a network has none.
    """

    def build(self, site: nn.Module) -> Adapter:
        """The adapter for a convolution, a linear layer or a normalisation without an affine map.

        Raises:
            PlanError: the output channels of such a module are not known.
        """
        channels = output_channels(site)
        if channels is None:
            raise PlanError(
                f"ChannelAffine stands after a convolution or a linear layer; the output channels "
                f"of {type(site).__name__} are not known."
            )
        like = next(t for t in (*site.parameters(), *site.buffers()) if t.is_floating_point())
        return ScaledChannels(channels, like)


@final
class ScaledChannels(RowwiseAdapter):
    """Scales and shifts what its site gives, per channel; starts as the identity.

    Args:
        channels: of the site's output.
        like: a tensor of the type and device that the scale and shift shall have.
    """

    def __init__(self, channels: Channels, like: Tensor) -> None:
        super().__init__()
        self.axis = channels.axis
        self.scale = nn.Parameter(torch.ones(channels.count, dtype=like.dtype, device=like.device))
        self.shift = nn.Parameter(torch.zeros_like(self.scale))

    def shared_names(self) -> frozenset[str]:
        """None: the task owns both tensors."""
        return frozenset()

    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:  # noqa: ARG002
        """The site's output (rows, C, ...) or (..., C), scaled and shifted, in its own type."""
        y = inner(*args)
        shape = (-1, *(1,) * (y.dim() - 2)) if self.axis == 1 else (-1,)
        return y * self.scale.to(y.dtype).view(shape) + self.shift.to(y.dtype).view(shape)

    def forward_rows(
        self,
        own: Mapping[str, Tensor],
        call: Call,  # noqa: ARG002
        site: str,  # noqa: ARG002
        inner: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """The same with a scale and a shift (rows, C) for each row."""
        y = inner(*args)

        def over(name: str) -> Tensor:
            each = own[name] if name in own else getattr(self, name)
            places = (1,) * (y.dim() - 2)
            shape = (-1, *places) if self.axis == 1 else (*places, -1)
            return each.to(y.dtype).reshape(*each.shape[:-1], *shape)

        return y * over("scale") + over("shift")

    def fold(self, site: nn.Module) -> nn.Module:
        """A copy of the layer with scale * weight and scale * bias + shift.

        Raises:
            PlanError: the layer may do more than its weight and bias say.
        """
        if not is_plain(site) or "weight" not in site._parameters:
            raise PlanError(
                f"A scale and shift do not fold into {type(site).__name__}, which is no layer of "
                "torch.nn or computes its weight from other tensors. Run it unfolded, or remove "
                "the reparametrisation first."
            )
        layer: Any = copy.deepcopy(site)
        with torch.no_grad():
            scale, shift = self.scale.detach(), self.shift.detach()
            if layer.weight is None:  # a normalisation without an affine map
                layer.affine = True
                layer.weight = nn.Parameter(scale.clone())
            else:
                layer.weight = nn.Parameter(layer.weight * per_weight(layer, scale))
            bias = shift if layer.bias is None else layer.bias * scale + shift
            layer.bias = nn.Parameter(bias.clone())
        return layer  # type: ignore[no-any-return]
