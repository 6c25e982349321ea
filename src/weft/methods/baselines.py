"""The baselines that every sharing method is measured against."""

from __future__ import annotations

from torch import nn

from weft.core.options import Options
from weft.core.patch import Patch, Replace
from weft.core.sharing import Group, Sharing
from weft.core.sites import sites
from weft.errors import PlanError


def linear_probe(base: nn.Module) -> Sharing:  # noqa: ARG001
    """A task owns its head and nothing else; the base, its statistics included, stays as it is.

    Args:
        base: any module.

    Returns:
        The plan.
    """
    return Sharing("linear_probe")


def full_finetune(base: nn.Module) -> Sharing:
    """A task owns every parameter of the base and the running statistics.

    Args:
        base: any module.

    Returns:
        The plan.
    """
    owned = [name for site in sites(base) for name in site.parameters + site.statistics]
    return Sharing("full_finetune", patches=dict.fromkeys(owned, Replace()))


def bias_only(base: nn.Module, *, statistics: bool = False) -> Sharing:
    """A task owns every bias: of convolutions, linear layers, attention and normalisation.

    Source: Ben Zaken, Ravfogel, Goldberg, "BitFit", ACL 2022, https://arxiv.org/abs/2106.10199.

    Args:
        base: a module with at least one bias.
        statistics: whether a task also owns the running statistics of batch normalisation.

    Returns:
        The plan.

    Raises:
        PlanError: a wrong option, or a base without biases.

    Differs from the paper in that it applies to any network, not to BERT only.
    """
    Options("bias_only").switch("statistics", statistics)
    found = sites(base)
    patches: dict[str, Patch] = {name: Replace() for site in found for name in site.biases}
    if not patches:
        raise PlanError("bias_only needs biases, and this base has none. Try linear_probe or taps.")
    if statistics:
        patches |= {name: Replace() for site in found for name in site.statistics}
    return Sharing(
        "bias_only",
        options={"statistics": statistics},
        patches=patches,
        groups=(Group(match=("*",), decay=False),),
    )
