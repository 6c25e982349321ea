"""RCM: each layer is a frozen filter bank, modulated by every task.

Kanakis, Bruggemann, Saha, Georgoulis, Obukhov, Van Gool, "Reparameterizing Convolutions for
Incremental Multi-Task Learning without Task Interference", ECCV 2020,
https://arxiv.org/abs/2007.12540.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.options import Options
from weft.core.patch import Patch, Replace
from weft.core.sharing import Created, Group, Sharing
from weft.core.sites import Site, sites
from weft.errors import PlanError
from weft.patches.modulated import Modulated, bank_key, basis_key, offset

from .model_patches import norm_patches
from .responses import LAYERS, Seen, layer_responses, outputs_first


def rcm(
    base: nn.Module,
    *,
    responses: Iterable[Any] | None = None,
    rank: float = 1.0,
    normalise: bool = True,
) -> Sharing:
    """A task owns a modulator of the outputs of every layer, over a filter bank that never trains.

    y = W_t (W_s * x): W_s has the layer's geometry, W_t is 1x1 from its outputs to its outputs, and
    nothing stands between them; here W_t W_s is composed into one weight, so that a task costs what
    the base costs. Normalisation, its statistics and biases are the task's own, and so are layers
    for which a modulator would be no smaller: 1x1 projections, depthwise and grouped convolutions.

    With ``responses``, U is the principal components of the layer's responses to them: W_s = U^T W
    and W_t starts at U. At full rank this is the base itself and only another system of
    coordinates. With fewer components, W_t W_s x is U U^T y, and b = m - U U^T m, with m the mean
    response, is put back: into the layer's bias, or else taken from the mean of the normalisation
    that follows.

    Args:
        base: any network with layers.
        responses: batches of the base's inputs, without targets; needed for a rank under 1.
        rank: share of a layer's outputs that are kept as components, in (0, 1].
        normalise: whether rows of modulators are normalised, with lengths of their own.

    Returns:
        The plan; adding tasks changes no other. Layers that stay shared are in its ``refused``.

    Raises:
        PlanError: a wrong option, or a base without layers.
        DataError: the responses are none.

    Source: sections 3.1 (reparametrisation), 3.2 (response initialisation), 3.3 (normalised
    feature fusion).

    Differs from the authors' code, which puts b back with the wrong sign, at full rank without
    consequence; and in that W_t W_s is composed instead of two convolutions run in training.
    """
    given = Options("rcm")
    given.number("rank", rank, "(0, 1]")
    given.switch("normalise", normalise)
    if rank < 1.0 and responses is None:
        raise PlanError(
            f"rcm(rank={rank}) keeps the components that matter for data: give responses=batches "
            "in Python. A configuration file cannot, and has rank 1."
        )
    found = sites(base)
    used = Counter(name for site in found for name in site.parameters)
    shapes = {name: p.shape for name, p in base.named_parameters()}
    seen = None if responses is None else layer_responses(base, responses)
    patches: dict[str, Patch] = {}
    created: dict[str, Created] = {}
    refused: dict[str, str] = {}
    for site in (s for s in found if s.kind in LAYERS):
        if site.refusal or any(used[name] > 1 for name in site.parameters):
            refused[site.name] = site.refusal or "its weight is tied to another layer's"
            continue
        patches |= dict.fromkeys(site.parameters, Replace(anchor=True))
        weight, layer = f"{site.name}.weight".lstrip("."), base.get_submodule(site.name)
        if weight not in site.parameters or not outputs_first(layer):
            continue
        if not layer.get_parameter("weight").is_floating_point():
            continue
        kept = max(1, math.ceil(rank * shapes[weight][0]))
        if shapes[weight][0] * kept >= shapes[weight].numel():
            continue
        if seen is None:
            patches[weight] = Modulated(0, normalise)
        elif site.name in seen:
            part, put_back = _components(layer, seen[site.name], kept)
            if put_back is not None and not site.biases and seen[site.name].norm is None:
                continue  # nothing could take b: the task owns the layer
            created |= {basis_key(weight): part[0], bank_key(weight): part[1]}
            patches[weight] = Modulated(kept, normalise)
            patches |= _put_back(site, seen[site.name], put_back)
    if not patches:
        raise PlanError("rcm modulates convolutions and linear layers, and this base has none.")
    norms = norm_patches(base)
    patches = {**norms, **patches}
    gains = tuple(key for name, p in patches.items() for key in p.keys(name) if ":gain" in key)
    return Sharing(
        "rcm",
        options={"rank": rank, "normalise": normalise},
        patches=patches,
        created=created,
        groups=(Group(match=(*gains, *norms), decay=False),),
        refused=refused,
    )


def _components(
    layer: nn.Module, seen: Seen, kept: int
) -> tuple[tuple[Created, Created], Tensor | None]:
    """Basis and bank of a layer, and b where components were left out."""
    mean = seen.total / seen.count
    covariance = seen.products / seen.count - torch.outer(mean, mean)
    # Row by row in memory, as files are read: products round by how their factors lie.
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :kept].contiguous()
    weight = layer.get_parameter("weight").detach()
    bank = (vectors.T @ weight.double().flatten(1)).view(kept, *weight.shape[1:])
    parts = (Created(vectors.to(weight), trains=False), Created(bank.to(weight), trains=False))
    if kept == len(mean):
        return parts, None
    put_back = mean - vectors @ (vectors.T @ mean)
    bias = layer._parameters.get("bias")
    if bias is not None:
        # The bias c is part of the response y = W x + c, and only W x becomes U U^T W x: what is
        # missing is b, and U U^T c - c.
        known = bias.detach().double()
        put_back = put_back + vectors @ (vectors.T @ known) - known
    return parts, put_back


def _put_back(site: Site, seen: Seen, put_back: Tensor | None) -> dict[str, Patch]:
    """Where b goes: into the bias, else off the mean that normalisation subtracts."""
    if put_back is None:
        return {}
    if site.biases:
        return {site.biases[0]: offset(put_back)}
    return {f"{seen.norm}.running_mean": offset(-put_back)}
