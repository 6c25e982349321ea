"""TAPS: which layers does a task need for itself?

Wallingford, Li, Achille, Ravichandran, Fowlkes, Bhotika, Soatto, "Task Adaptive Parameter Sharing
for Multi-Task Learning", CVPR 2022, https://arxiv.org/abs/2203.16708.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import nn

from weft.core.options import Options, is_number, is_whole
from weft.core.patch import Patch
from weft.core.sharing import Group, Phase, Sharing
from weft.core.sites import Kind, named_tensors, sites
from weft.errors import PlanError
from weft.patches.gated import GatedResidual, GatedTuned
from weft.penalties import L1Scores

from .budget import Budget, ChooseWithin, DualAscent
from .model_patches import norm_patches

PRICE = "taps:price"
"""Key of the price that a task's budget has reached."""


def taps(
    base: nn.Module,
    *,
    penalty: float = 0.3,
    budget: float | None = None,
    charge: Literal["layers", "parameters"] | None = None,
    warmup: int = 3,
    harden: float = 0.3,
    initial_score: float = 0.15,
    threshold: float = 0.1,
    form: Literal["tuned", "residual"] | None = None,
    joint: bool = False,
    legacy_norm: int | None = None,
) -> Sharing:
    """Every convolution and linear layer has a gate per task; open layers are the task's own.

    The effective weight is W + g(s) D with the hard gate g(s) = 1 if s >= threshold. The backward
    passes the gate's gradient straight to s, also through closed gates. The loss is
    CE + penalty * sum_i |s_i| / N over the N gates. Normalisation and head are always the task's.

    Source: sections 3.1 to 3.3.

    Args:
        base: a module with convolutions or linear layers.
        penalty: the price lambda of the scores, >= 0. More means fewer own layers. It is coupled
            to the learning rate: sweep both, or give a budget.
        budget: how much a task may own, without its head: a share of the base's parameters in
            (0, 1], or a whole number of bytes (running statistics included). The price then starts
            at ``penalty`` and moves until what is open fits; each task ends at or under the budget.
        charge: "layers" charges each gate 1/N, as the paper does; "parameters" charges it its
            layer's share of the gated parameters. Default: "layers", with a budget "parameters".
        warmup: epochs without penalty at the start.
        harden: share of the epochs after the warm-up, in [0, 1), at the end of training in which
            scores are frozen and cost nothing, so that running statistics fit the final gates.
        initial_score: where scores start.
        threshold: scores at or over it are open.
        form: "tuned" chooses between base and tuned tensors and needs a frozen base; "residual"
            adds a residual and works over a training base. Default: what the base needs.
        joint: whether the base trains too, together with the residuals and scores of all tasks.
        legacy_norm: divide by this number instead of the number of gates; the authors' code always
            divides by 52.

    Returns:
        The plan.

    Raises:
        PlanError: a wrong option, nothing to gate, or a budget below what is always owned.

    Differs from the paper in the final phase with frozen scores (``harden=0`` leaves it out): gates
    that flip in the last epochs leave running statistics that do not fit. A linear layer's bias
    follows the gate of its weight. Budgets and the charge by parameters are not in the paper.
    """
    form = form or ("residual" if joint else "tuned")
    charge = charge or ("layers" if budget is None else "parameters")
    _check_options(
        *(penalty, budget, charge, warmup, harden, form, joint),
        *(initial_score, threshold, legacy_norm),
    )
    price = PRICE if budget is not None else None
    make = GatedTuned if form == "tuned" else GatedResidual
    patches: dict[str, Patch] = {}
    gates: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for site in sites(base):
        if site.kind not in (Kind.LAYER, Kind.DEPTHWISE):
            continue
        if site.refusal:
            refused[site.name] = site.refusal
            continue
        score = f"{site.name}:score"
        new = tuple(name for name in site.parameters if name not in patches)
        patches |= {n: make(score, initial_score, threshold, price, penalty) for n in new}
        gates |= {score: new} if new else {}
    if not gates:
        raise PlanError("taps gates convolutions and linear layers, and this base has none.")
    norms = norm_patches(base)
    shared = frozenset(n for site in sites(base) for n in site.parameters if n not in norms)
    shares = _shares(base, gates, charge, legacy_norm)
    phases = _phases(warmup, harden)
    if budget is not None:
        phases = _within(phases, _budget(base, budget, gates, norms, threshold))
    return Sharing(
        "taps",
        options={
            "penalty": penalty,
            "budget": budget,
            "charge": charge,
            "warmup": warmup,
            "harden": harden,
            "initial_score": initial_score,
            "threshold": threshold,
            "form": form,
            "joint": joint,
            "legacy_norm": legacy_norm,
        },
        patches={**patches, **norms},
        train_shared=shared if joint else frozenset(),
        penalties=(L1Scores(penalty, tuple(gates), shares, price),),
        phases=phases,
        # Decay on scores would be a hidden second penalty; scales and shifts are not decayed.
        groups=(Group(match=(*gates, *norms), decay=False),),
        refused=refused,
    )


def _shares(
    base: nn.Module, gates: Mapping[str, tuple[str, ...]], charge: str, legacy_norm: int | None
) -> tuple[float, ...]:
    if charge == "layers":
        return (1.0 / (legacy_norm or len(gates)),) * len(gates)
    size = {name: p.numel() for name, p in base.named_parameters()}
    sizes = [sum(size[name] for name in names) for names in gates.values()]
    return tuple(s / sum(sizes) for s in sizes)


def _budget(
    base: nn.Module,
    budget: float,
    gates: Mapping[str, tuple[str, ...]],
    norms: Mapping[str, Patch],
    threshold: float,
) -> Budget:
    if isinstance(budget, int) and budget != 1:
        cost = {n: t.numel() * t.element_size() for n, t in named_tensors(base)}
        most, unit = budget, "bytes"
    else:
        cost = {n: p.numel() for n, p in base.named_parameters()}
        most, unit = math.floor(budget * sum(cost.values())), "parameters"
    costs = tuple(sum(cost[name] for name in names) for names in gates.values())
    fixed = sum(cost.get(name, 0) for name in norms)
    found = Budget(tuple(gates), costs, fixed, most, threshold, PRICE)
    found.check(unit)
    return found


def _within(phases: tuple[Phase, ...], budget: Budget) -> tuple[Phase, ...]:
    *before, select, harden = phases
    return (
        *before,
        replace(select, transition=DualAscent(budget), every=1),
        replace(harden, prepare=ChooseWithin(budget), required=True),
    )


def _phases(warmup: int, harden: float) -> tuple[Phase, ...]:
    # While gates still move, the best epoch is the one that owns the most: keep a later one.
    phases = [
        Phase("select", share=1.0 - harden, selectable=harden == 0.0),
        Phase("harden", share=harden, freeze=("*:score",), penalty=0.0),
    ]
    first = [Phase("warm-up", epochs=warmup, penalty=0.0, selectable=False)]
    return tuple((first if warmup else []) + (phases if harden else phases[:1]))


def _check_options(
    penalty: float,
    budget: float | None,
    charge: str,
    warmup: int,
    harden: float,
    form: str,
    joint: bool,
    initial_score: float,
    threshold: float,
    legacy_norm: int | None,
) -> None:
    given = Options("taps")
    given.number("initial_score", initial_score)
    given.number("threshold", threshold)
    given.number("penalty", penalty, "[0, inf)")
    given.number("harden", harden, "[0, 1)")
    given.word("charge", charge, ("layers", "parameters"))
    given.word("form", form, ("tuned", "residual"))
    given.whole("warmup", warmup, 0)
    given.switch("joint", joint)
    if budget is not None:
        if not is_whole(budget, 2) and not (is_number(budget) and 0.0 < budget <= 1.0):
            raise PlanError(
                "taps(budget=...) is a share of the base's parameters in (0, 1] or a whole number "
                f"of bytes, found {budget!r}."
            )
        if charge == "layers":
            raise PlanError("taps(budget=...) goes with charge='parameters', found 'layers'.")
        if harden == 0.0 or penalty == 0.0:
            raise PlanError(
                "taps(budget=...) chooses the final gates before the phase with frozen scores and "
                "moves the price from where it starts: harden and penalty must not be 0."
            )
    if joint and form == "tuned":
        raise PlanError("taps(joint=True) trains the base, over which only form='residual' works.")
    if legacy_norm is not None:
        given.number("legacy_norm", legacy_norm, "(0, inf)", "or None")
    if legacy_norm is not None and charge == "parameters":
        raise PlanError("taps(legacy_norm=...) goes with charge='layers', found 'parameters'.")
