"""Model patches: a small set of own parameters next to a shared network.

Mudrakarta, Sandler, Zhmoginov, Howard, "K for the Price of 1: Parameter-efficient Multi-task and
Transfer Learning", ICLR 2019, https://arxiv.org/abs/1810.10703.
"""

from __future__ import annotations

from torch import nn

from weft.core.patch import Patch, Replace
from weft.core.sharing import Group, Sharing
from weft.core.sites import Kind, sites
from weft.errors import PlanError


def norm_patches(base: nn.Module) -> dict[str, Patch]:
    """Own copies of every normalisation's scale, shift and running statistics, by tensor name."""
    return {
        name: Replace()
        for site in sites(base)
        if site.kind is Kind.NORM
        for name in site.parameters + site.statistics
    }


def scale_bias(base: nn.Module) -> Sharing:
    """A task owns the scale and shift of every normalisation, with its running statistics.

    y = gamma * norm(x) + beta per channel. Once deployed, batch statistics, gamma and beta fold to
    two numbers per channel.

    Source: K for the Price of 1, section 4.

    Args:
        base: a module with normalisation layers.

    Returns:
        The plan. It wants a higher learning rate than fine-tuning, about ten times.

    Raises:
        PlanError: the base has no normalisation.

    Differs from the paper in that running statistics are always per task, which the paper needs
    only when tasks train together.
    """
    patches = norm_patches(base)
    if not patches:
        raise PlanError(
            "scale_bias owns the scales and shifts of normalisation layers, and this base has "
            "none. Try bias_only or taps."
        )
    return Sharing("scale_bias", patches=patches, groups=(Group(match=("*",), decay=False),))


def depthwise_patch(base: nn.Module, *, scale_bias: bool = True) -> Sharing:
    """A task owns the depthwise (spatial) kernels; pointwise and full convolutions are shared.

    Source: K for the Price of 1, section 4.

    Args:
        base: a module with depthwise convolutions.
        scale_bias: whether the task owns the normalisation as well, as in `scale_bias`.

    Returns:
        The plan.

    Raises:
        PlanError: the base has no depthwise convolution.
    """
    depthwise = [s for s in sites(base) if s.kind is Kind.DEPTHWISE]
    if not depthwise:
        raise PlanError(
            "depthwise_patch owns depthwise convolutions (one group per input channel), and this "
            "base has none. Try scale_bias or taps."
        )
    norms = norm_patches(base) if scale_bias else {}
    kernels: dict[str, Patch] = {name: Replace() for s in depthwise for name in s.parameters}
    return Sharing(
        "depthwise_patch",
        options={"scale_bias": scale_bias},
        patches={**kernels, **norms},
        groups=(Group(match=tuple(norms), decay=False),) if norms else (),
    )
