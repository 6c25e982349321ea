"""Model patches: a small set of own parameters next to a shared network.

Mudrakarta, Sandler, Zhmoginov, Howard, "K for the Price of 1: Parameter-efficient Multi-task and
Transfer Learning", ICLR 2019, https://arxiv.org/abs/1810.10703.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from weft.adapters.channel_affine import ChannelAffine
from weft.core.adapter import Insertion
from weft.core.channels import output_channels
from weft.core.options import Options
from weft.core.patch import Patch, Replace
from weft.core.sharing import Group, Sharing
from weft.core.sites import Kind, Site, everything, sites
from weft.errors import PlanError

Where = Literal["norms", "layers"]


def scale_bias(base: nn.Module, *, where: Where | None = None, train_base: bool = False) -> Sharing:
    """A task owns a scale and a shift per channel.

    y = gamma * norm(x) + beta. Once deployed, batch statistics, gamma and beta fold to two numbers
    per channel.

    Source: K for the Price of 1, section 4.

    Args:
        base: a module with normalisations, convolutions or linear layers.
        where: "norms" owns the scales, shifts and running statistics of the normalisations,
            "layers" inserts new scales and shifts, at first the identity, after every convolution
            and linear layer. Default: "norms" if the base has any, otherwise "layers".
        train_base: whether the rest of the base trains too, for all tasks together (simultaneous
            training); each task then has running statistics of its own in any case.

    Returns:
        The plan. It wants a higher learning rate than fine-tuning, about ten times. Layers that
        cannot get a scale and shift are in its ``refused``, with the reason.

    Raises:
        PlanError: a wrong option, or a base without anything to scale and shift.

    Differs from the paper in that running statistics are per task also where tasks train one by
    one, and that scales and shifts are inserted after linear layers too.
    """
    given = Options("scale_bias")
    given.word("where", where, (None, "norms", "layers"))
    given.switch("train_base", train_base)
    where = where or ("norms" if norm_patches(base) else "layers")
    affines = _at_norms(base) if where == "norms" else _at_layers(base)
    if not affines.patches and not affines.adapters:
        what = {
            "norms": "normalisation layers",
            "layers": "normalisation layers, or adds them to convolutions and linear layers",
        }
        raise PlanError(
            f"scale_bias owns the scales and shifts of {what[where]}, and this base has none. "
            "Try bias_only or taps."
        )
    return _plan("scale_bias", base, {"where": where}, {}, affines, train_base=train_base)


def depthwise_patch(
    base: nn.Module, *, scale_bias: bool = True, train_base: bool = False
) -> Sharing:
    """A task owns the depthwise (spatial) kernels; pointwise and full convolutions are shared.

    Source: K for the Price of 1, section 4.

    Args:
        base: a module with depthwise convolutions.
        scale_bias: whether the task owns scales and shifts as well, as in `scale_bias`.
        train_base: as in `scale_bias`.

    Returns:
        The plan.

    Raises:
        PlanError: a wrong option, or a base without depthwise convolutions.

    Differs from the paper as `scale_bias` does.
    """
    given = Options("depthwise_patch")
    given.switch("scale_bias", scale_bias)
    given.switch("train_base", train_base)
    depthwise = [s for s in sites(base) if s.kind is Kind.DEPTHWISE]
    if not depthwise:
        raise PlanError(
            "depthwise_patch owns depthwise convolutions (one group per input channel), and this "
            "base has none. Try scale_bias or taps."
        )
    kernels: dict[str, Patch] = {name: Replace() for s in depthwise for name in s.parameters}
    affines = _Affines()
    if scale_bias:
        affines = _at_norms(base) if norm_patches(base) else _at_layers(base)
    options = {"scale_bias": scale_bias}
    return _plan("depthwise_patch", base, options, kernels, affines, train_base=train_base)


def norm_patches(base: nn.Module) -> dict[str, Patch]:
    """Own copies of every normalisation's scale, shift and running statistics, by tensor name."""
    return {
        name: Replace()
        for site in sites(base)
        if site.kind is Kind.NORM
        for name in site.parameters + site.statistics
    }


@dataclass(frozen=True)
class _Affines:
    """What gives a task its scales and shifts: a part of a plan."""

    patches: Mapping[str, Patch] = field(default_factory=dict)
    adapters: Mapping[str, Insertion] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def _at_norms(base: nn.Module) -> _Affines:
    """Those of the normalisations; one that only has statistics gets new ones behind it."""
    bare = [s for s in sites(base) if s.kind is Kind.NORM and not s.parameters]
    return _Affines(norm_patches(base), *_inserted(base, bare))


def _at_layers(base: nn.Module) -> _Affines:
    """New ones behind every layer."""
    layers = [s for s in sites(base) if s.kind in (Kind.LAYER, Kind.DEPTHWISE)]
    return _Affines({}, *_inserted(base, layers))


def _inserted(base: nn.Module, wanted: list[Site]) -> tuple[dict[str, Insertion], dict[str, str]]:
    """The wanted sites that a scale and shift can stand behind, and why at the others none can."""
    used = Counter(name for site in sites(base) for name in site.parameters)
    adapters: dict[str, Insertion] = {}
    refused: dict[str, str] = {}
    for site in wanted:
        if not site.name:
            reason = "the base itself is the layer; wrap it, for instance in nn.Sequential"
        elif any(_contains(outer.name, site.name) for outer in wanted):
            reason = "a part of another layer, which uses its tensors without calling it"
        elif output_channels(base.get_submodule(site.name)) is None:
            reason = "its output channels are not known"
        elif any(used[name] > 1 for name in site.parameters):
            reason = "its weight is used elsewhere too, so a scale could not be folded into it"
        else:
            adapters[site.name] = ChannelAffine()
            continue
        refused[site.name] = reason
    return adapters, refused


def _contains(outer: str, name: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _plan(
    method: str,
    base: nn.Module,
    options: Mapping[str, Any],
    kernels: Mapping[str, Patch],
    affines: _Affines,
    *,
    train_base: bool,
) -> Sharing:
    patches = {**kernels, **affines.patches}
    common: frozenset[str] = frozenset()
    if train_base:
        # Statistics of mixed tasks fit none of them.
        patches |= {name: Replace() for site in sites(base) for name in site.statistics}
        common = everything(base) - patches.keys()
    undecayed = (*affines.patches, *(f"{site}:*" for site in affines.adapters))
    return Sharing(
        method,
        options={**options, "train_base": train_base},
        patches=patches,
        adapters=affines.adapters,
        train_shared=common,
        groups=(Group(match=undecayed, decay=False),) if undecayed else (),
        refused=affines.refused,
    )
