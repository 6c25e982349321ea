"""TAPS: which layers does a task need for itself?

Wallingford, Li, Achille, Ravichandran, Fowlkes, Bhotika, Soatto, "Task Adaptive Parameter Sharing
for Multi-Task Learning", CVPR 2022, https://arxiv.org/abs/2203.16708.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from weft.core.patch import Patch
from weft.core.sharing import Group, Phase, Sharing
from weft.core.sites import Kind, sites
from weft.errors import PlanError
from weft.patches.gated import GatedResidual, GatedTuned
from weft.penalties import L1Scores

from .model_patches import norm_patches


def taps(
    base: nn.Module,
    *,
    penalty: float = 0.3,
    warmup: int = 3,
    harden: float = 0.3,
    initial_score: float = 0.15,
    threshold: float = 0.1,
    form: Literal["tuned", "residual"] = "tuned",
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
            to the learning rate: sweep both.
        warmup: epochs without penalty at the start.
        harden: share of the epochs after the warm-up, in [0, 1), at the end of training in which
            scores are frozen and cost nothing, so that running statistics fit the final gates.
        initial_score: where scores start.
        threshold: scores at or over it are open.
        form: "tuned" chooses between base and tuned tensors and needs a frozen base; "residual"
            adds a residual and works over a training base.
        legacy_norm: divide by this number instead of the number of gates; the authors' code always
            divides by 52.

    Returns:
        The plan.

    Raises:
        PlanError: a wrong option, or nothing to gate.

    Differs from the paper in the final phase with frozen scores (``harden=0`` leaves it out): gates
    that flip in the last epochs leave running statistics that do not fit. A linear layer's bias
    follows the gate of its weight.
    """
    _check_options(penalty, warmup, harden, form, legacy_norm)
    patches: dict[str, Patch] = {}
    scores: list[str] = []
    refused: dict[str, str] = {}
    for site in sites(base):
        if site.kind not in (Kind.LAYER, Kind.DEPTHWISE):
            continue
        if site.refusal:
            refused[site.name] = site.refusal
            continue
        score = f"{site.name}:score"
        make = GatedTuned if form == "tuned" else GatedResidual
        new = [name for name in site.parameters if name not in patches]
        patches |= {name: make(score, initial_score, threshold) for name in new}
        scores += [score] if new else []
    if not scores:
        raise PlanError("taps gates convolutions and linear layers, and this base has none.")
    return Sharing(
        "taps",
        options={
            "penalty": penalty,
            "warmup": warmup,
            "harden": harden,
            "initial_score": initial_score,
            "threshold": threshold,
            "form": form,
            "legacy_norm": legacy_norm,
        },
        patches={**patches, **norm_patches(base)},
        penalties=(L1Scores(penalty, tuple(scores), legacy_norm or len(scores)),),
        phases=_phases(warmup, harden),
        # Decay on scores would be a hidden second penalty; scales and shifts are not decayed.
        groups=(Group(match=(*scores, *norm_patches(base)), decay=False),),
        refused=refused,
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
    penalty: float, warmup: int, harden: float, form: str, legacy_norm: int | None
) -> None:
    if not penalty >= 0.0:
        raise PlanError(f"taps(penalty=...) is a number >= 0, found {penalty}.")
    if warmup < 0 or warmup != int(warmup):
        raise PlanError(f"taps(warmup=...) is a whole number of epochs >= 0, found {warmup}.")
    if not 0.0 <= harden < 1.0:
        raise PlanError(f"taps(harden=...) is a share in [0, 1), found {harden}.")
    if form not in ("tuned", "residual"):
        raise PlanError(f"taps(form=...) is 'tuned' or 'residual', found {form!r}.")
    if legacy_norm is not None and legacy_norm <= 0:
        raise PlanError(f"taps(legacy_norm=...) is a number > 0 or None, found {legacy_norm}.")
