"""PaCo: the parameters of each task are a mixture of a few sets of parameters that all share.

Sun, Zhang, Xu, Tomizuka, "PaCo: Parameter-Compositional Multi-Task Reinforcement Learning",
NeurIPS 2022, https://arxiv.org/abs/2210.11653.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.options import Options
from weft.core.patch import Patch, Replace
from weft.core.sharing import Created, Group, Phase, Sharing, Taken
from weft.core.sites import Kind, sites
from weft.errors import PlanError
from weft.patches.mixture import Mixture, bases_key

COEFFICIENTS = "paco:coefficients"
"""Key of a task's K numbers."""

Reset = Literal["interpolate", "copy"]


def paco(
    base: nn.Module,
    *,
    k: int = 5,
    bases: Literal["trained", "given"] = "trained",
    fixed_coefficients: bool = False,
    softmax: bool = False,
    noise: float = 0.0,
    norms: Literal["private", "shared"] = "private",
    limit: float | None = None,
    reset: Reset = "interpolate",
    seed: int = 0,
) -> Sharing:
    """Every task owns K numbers w_t, the same for all layers: theta_t = sum_k w_tk Phi_k.

    Mixed are all parameters but those of normalisation. Bases and numbers train together. A new
    task needs its numbers only:

        model.add_task("new", task, sharing=weft.paco(base, bases="given"))
        weft.fit(model, {"new": data})

    Source: the compositional structure and the scheme for stable training.

    Args:
        base: any module; where the bases start.
        k: K, the number of bases, >= 1.
        bases: "trained", or "given" for a task that is added to a model with such a plan: the
            model's bases stay as they are.
        fixed_coefficients: whether tasks keep the numbers that they have. With K tasks and one
            basis for each, this is full fine-tuning.
        softmax: whether the weights are the softmax of the numbers, instead of the numbers.
        noise: what is added to each basis at the start, in standard deviations of each tensor, >=
            0; without it all bases start alike, and tasks' numbers make them differ.
        norms: "private" gives each task normalisations of its own, with statistics; "shared" trains
            one for all. They are never mixed: running statistics are no sums of others.
        limit: a task whose loss in a step is over it, or not a number, does not count in that step,
            and its numbers are drawn anew from those of the others; None for no limit. The paper's
            is 3000, for its losses. Not together with fixed coefficients.
        reset: "interpolate" draws a random convex combination of the other tasks' numbers, "copy"
            takes those of one of them.
        seed: of noise and of resets.

    Returns:
        The plan. Tasks train together, except with given bases.

    Raises:
        PlanError: a wrong option, or nothing to mix.

    Differs from the paper in that new numbers are a random point with sum one, so that a new task
    starts as the base up to rounding; in normalisation, which its networks have none of; and in
    that heads are the tasks' own, not mixed.
    """
    given = Options("paco")
    given.whole("k", k, 1)
    given.word("bases", bases, ("trained", "given"))
    given.word("norms", norms, ("private", "shared"))
    given.word("reset", reset, ("interpolate", "copy"))
    given.switch("fixed_coefficients", fixed_coefficients)
    given.switch("softmax", softmax)
    given.number("noise", noise, "[0, inf)")
    given.seed("seed", seed)
    if limit is not None and limit != math.inf:  # infinite: only what is no number is over it
        given.number("limit", limit, "(0, inf)", "or None")
    if fixed_coefficients and limit is not None:
        raise PlanError(
            "paco(fixed_coefficients=True) keeps the numbers of tasks, and limit=... draws them "
            "anew when a task diverges. Give one of the two."
        )
    found = sites(base)
    # No sets: tensors must have one order in all processes that train together.
    normal = [n for s in found if s.kind is Kind.NORM for n in s.parameters + s.statistics]
    names = dict.fromkeys(n for s in found for n in s.parameters if n not in normal)
    if not names:
        raise PlanError("paco mixes parameters, and this base has none but normalisation.")
    patches: dict[str, Patch] = dict.fromkeys(names, Mixture(COEFFICIENTS, k, softmax))
    if norms == "private":
        patches |= dict.fromkeys(normal, Replace())
    trained = bases == "trained"
    return Sharing(
        "paco",
        options={
            "k": k,
            "bases": bases,
            "fixed_coefficients": fixed_coefficients,
            "softmax": softmax,
            "noise": noise,
            "norms": norms,
            "limit": limit,
            "reset": reset,
            "seed": seed,
        },
        patches=patches,
        created=_bases(base, names, k, noise, seed) if trained else {},
        train_shared=frozenset(normal if trained and norms == "shared" else ()),
        phases=(
            Phase(
                "train",
                freeze=(COEFFICIENTS,) if fixed_coefficients else (),
                review=None if limit is None else ResetCoefficients(reset, seed),
                every=None if limit is None else 1,
                loss_limit=limit,
            ),
        ),
        # Decay would pull the mixture, not only its parts, to zero.
        groups=(Group(match=(COEFFICIENTS,), decay=False),),
    )


def _bases(
    base: nn.Module, names: dict[str, None], k: int, noise: float, seed: int
) -> dict[str, Created]:
    parameters = dict(base.named_parameters())
    created = {}
    for name in names:
        start = parameters[name].detach()
        value = start.expand(k, *start.shape).clone()
        if noise:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            scale = noise * float(start.std(correction=0))
            value += scale * torch.randn(value.shape, generator=generator).to(value)
        created[bases_key(name)] = Created(value)
    return created


@dataclass(frozen=True)
class ResetCoefficients:
    """A review: tasks that did not count in the step take numbers from those that did.

    Args:
        how: a random convex combination of theirs, or those of one of them.
        seed: of the drawing.
    """

    how: Reset
    seed: int

    @torch.no_grad()
    def __call__(self, model: MultiTaskModel, taken: Taken) -> list[Tensor] | None:
        """Write the numbers; the optimiser forgets what it knew of the old ones."""
        healthy = [task for task in taken.batches if task not in taken.refused]
        if not healthy or not taken.refused:
            return None
        known = torch.stack([model.tasks[task].own[COEFFICIENTS] for task in healthy])
        changed = []
        for task in sorted(taken.refused):
            word = f"{self.seed} {task} {taken.done}"
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            drawn = torch.rand(len(healthy), generator=generator, dtype=torch.float64)
            if self.how == "interpolate":
                shares = -torch.log1p(-drawn)  # over their sum uniform among convex combinations
                shares /= shares.sum()
            else:
                shares = torch.zeros_like(drawn)
                shares[math.floor(float(drawn[0]) * len(healthy))] = 1.0
            numbers = model.tasks[task].own[COEFFICIENTS]
            numbers.copy_(shares.to(known) @ known)
            changed.append(numbers)
        return changed
