"""DiSparse: one sparse network for all tasks, in which a weight goes only if every task lets it go.

Sun, Hassani, Wang, Huang, Shi, "DiSparse: Disentangled Sparsification for Multitask Model
Compression", CVPR 2022, https://arxiv.org/abs/2206.04662.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from weft.core.masks import KEEP, new_buffer, shared_key
from weft.core.options import Options
from weft.core.sharing import Created, Phase, Sharing
from weft.core.sites import everything, layer_weights
from weft.errors import PlanError

from .growth import STALE, DropAndGrow, KeepDensities, RandomMasks
from .hard_sharing import private_batchnorm
from .sparsity import OVERLAP, Prune, Score, Weights

Variant = Literal["static", "pretrained", "dynamic"]


def disparse(
    base: nn.Module,
    *,
    sparsity: float = 0.9,
    variant: Variant = "static",
    score: Score | None = None,
    batches: int = 50,
    weights: Weights = "own",
    dense: float = 0.5,
    explore: float = 0.75,
    every: int = 50,
    drop: float = 0.5,
    power: float = 0.9,
    regrow: Literal["zero", "stale"] = "zero",
    batchnorm: Literal["shared", "private"] = "shared",
    seed: int = 0,
) -> Sharing:
    """All tasks train one network, most of whose weights are zero, with heads that are as sparse.

    Each task looks at the shared weights and its own head as a network of its own, ranks their
    weights by its own loss, and keeps the best ones, the same share rho in every task. A weight of
    the head goes if its task does not keep it, a shared weight if no task does. rho is such that
    ``sparsity`` of all these weights are zero.

    Source: the variants "static", "pretrained" and "dynamic" of the paper and the authors' code.

    Args:
        base: a module with convolutions or linear layers.
        sparsity: the share of the weights of convolutions and linear layers that are zero, heads
            included, in [0, 1). Biases and normalisation stay dense.
        variant: "static" prunes once, before training; "pretrained" trains, prunes once, and trains
            on; "dynamic" starts from random masks and drops and grows weights while it trains.
        score: what weights are ranked by: "saliency" is sum_batches abs(g w), "magnitude" abs(w),
            "taylor" (sum_batches abs(g)) w^2, with the gradient g of the task's own loss. Default:
            "saliency" for "static", "magnitude" for "pretrained".
        batches: of each task's training data, that gradients are taken on.
        weights: "own" ranks the weights by what they are; "xavier" ranks them by what they would be
            in a copy of the network drawn anew (Xavier, normal), as the authors' code does.
        dense: "pretrained": the share of the epochs before pruning, in [0, 1).
        explore: "dynamic": the share of the epochs in which masks change, in (0, 1).
        every: "dynamic": optimiser steps between two changes of the masks.
        drop: "dynamic": the share of a layer's weights that the first change drops, in (0, 1]; it
            falls to zero like a cosine.
        power: "dynamic": the exponent by which layers of fewer inputs and outputs are denser (ERK),
            >= 0; 0 makes all layers alike.
        regrow: "dynamic": a weight that is grown starts at "zero" or where it was when it was
            dropped ("stale", the authors' code).
        batchnorm: "private" gives each task batch normalisations of its own.
        seed: of random masks and of "xavier".

    Returns:
        The plan. Tasks train together.

    Raises:
        PlanError: a wrong option, or no weights to prune.

    Differs from the paper in that rho is found, not tuned by hand for each sparsity; that weights
    are ranked by what they are by default (``weights``); and, for "dynamic", that grown weights
    start at zero (``regrow``) with nothing remembered by the optimiser, that the first layer is as
    sparse as the formula says, and that gradients are of the batch of the step, undivided.
    """
    _check(
        *(sparsity, variant, score, batches, weights, dense, explore, every, drop, power),
        *(regrow, batchnorm, seed),
    )
    names = layer_weights(base)
    if not names:
        raise PlanError(
            "disparse prunes the weights of convolutions and linear layers, and this base has none."
        )
    score = score or ("magnitude" if variant == "pretrained" else "saliency")
    parameters = dict(base.named_parameters())
    buffers = (KEEP, STALE) if variant == "dynamic" and regrow == "stale" else (KEEP,)
    created = {
        shared_key(name, buffer): Created(new_buffer(parameters[name].detach(), buffer), False)
        for name in names
        for buffer in buffers
    }
    created[OVERLAP] = Created(torch.ones(len(names)), trains=False)
    patches = private_batchnorm(base) if batchnorm == "private" else {}
    prune = Prune(names, sparsity, score, batches, weights, seed)
    keep = KeepDensities(names, sparsity, power)
    phases = {
        "static": (Phase("sparse", prepare=prune),),
        "pretrained": (
            Phase("dense", share=dense, selectable=False),
            Phase("fine-tune", share=1.0 - dense, prepare=prune, required=True),
        ),
        "dynamic": (
            Phase(
                "explore",
                share=explore,
                selectable=False,
                prepare=RandomMasks(names, sparsity, power, seed),
                review=DropAndGrow(names, sparsity, power, drop, stale=regrow == "stale"),
                every=every,
            ),
            Phase("fixed", share=1.0 - explore, prepare=keep, required=True),
        ),
    }[variant]
    return Sharing(
        "disparse",
        options={
            "sparsity": sparsity,
            "variant": variant,
            "score": None if variant == "dynamic" else score,
            "batches": batches,
            "weights": weights,
            "dense": dense,
            "explore": explore,
            "every": every,
            "drop": drop,
            "power": power,
            "regrow": regrow,
            "batchnorm": batchnorm,
            "seed": seed,
        },
        patches=patches,
        created=created,
        train_shared=everything(base) - patches.keys(),
        phases=phases if dense or variant != "pretrained" else phases[1:],
        masked=frozenset(names),
        head_buffers=buffers,
    )


def _check(
    sparsity: float,
    variant: str,
    score: str | None,
    batches: int,
    weights: str,
    dense: float,
    explore: float,
    every: int,
    drop: float,
    power: float,
    regrow: str,
    batchnorm: str,
    seed: int,
) -> None:
    given = Options("disparse")
    given.word("variant", variant, ("static", "pretrained", "dynamic"))
    given.word("score", score, (None, "saliency", "magnitude", "taylor"))
    given.word("weights", weights, ("own", "xavier"))
    given.word("regrow", regrow, ("zero", "stale"))
    given.word("batchnorm", batchnorm, ("shared", "private"))
    given.number("sparsity", sparsity, "[0, 1)")
    given.whole("batches", batches, 1)
    given.number("dense", dense, "[0, 1)")
    given.number("explore", explore, "(0, 1)")
    given.whole("every", every, 1)
    given.number("drop", drop, "(0, 1]")
    given.number("power", power, "[0, inf)")
    given.seed("seed", seed)
    if variant == "dynamic" and score is not None:
        raise PlanError(
            "disparse(variant='dynamic') drops by magnitude and grows by gradient; leave out "
            f"score={score!r}."
        )
