"""BoRA: the low-rank tensors of all tasks are tied to a mean that is learned with them.

Eide, Frigessi, "BoRA: Bayesian Hierarchical Low-Rank Adaption for Multi-Task Large Language
Models", 2024, https://arxiv.org/abs/2407.15857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from weft.adapters.low_rank import LowRank
from weft.core.checks import adapter_tensors, check_plan
from weft.core.options import Options
from weft.core.sharing import Created, Sharing
from weft.core.sites import named_tensors
from weft.errors import PlanError
from weft.patches.low_rank import LowRankSum, common_keys
from weft.penalties import TieToMean

from .lora import lora

Form = Literal["squared", "norm"]
"""Which charge."""

Mean = Literal["trained", "given"]
"""Whose mean."""

MEAN = "mean:"
"""What the key of a mean begins with; the key of the own tensors follows."""


def bora(
    base: nn.Module,
    *,
    tau: float = 1.0,
    r: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    form: Form = "squared",
    rows: float = 1.0,
    mean: Mean = "trained",
    joined: bool = False,
) -> Sharing:
    """LoRA for each task, with the prior theta_t ~ N(Theta, I / tau) on its factors.

    The tasks train together on ``sum_t NLL_t(theta_t) + tau / 2 sum_t |theta_t - Theta|^2``, where
    Theta, the mean, is learned as well. It is not used in the forward, unless joined. tau = 0 is
    LoRA for each task alone, without a mean; a large one is the same low-rank change for all tasks.

    The negative log-likelihood of a task is a sum over its rows: a task with many rows heeds the
    prior less. `fit` takes means over rows, so give it ``weights={task: its rows / mean rows}`` and
    this plan ``rows=`` the mean number of rows of a task.

    A new task can be fitted alone under the mean that the others have learned:

        model.add_task("new", task, sharing=weft.bora(base, tau=10, mean="given"))
        weft.fit(model, {"new": data})

    Args:
        base: as for `lora`.
        tau: precision of the prior, >= 0; chosen on validation. With SGD keep the learning rate
            under 2 rows / (tau (tasks + 1)), or training diverges.
        r: as for `lora`, like alpha, dropout, target and exclude.
        alpha: as there.
        dropout: as there.
        target: as there.
        exclude: as there.
        form: "squared", or "norm": ``tau sum_t sum_i |theta_ti - Theta_i|`` over tensors i.
        rows: what the charge is divided by, > 0.
        mean: "trained", or "given" for a task that is added to a model with such a plan: the
            model's mean stays as it is.
        joined: whether the mean runs as a branch of its own, shared by all, beside each task's,
            and tasks are charged for theirs alone: ``tau / 2 sum_t |theta_t|^2``.

    Returns:
        The plan. With tau > 0 the tasks' mean trains with all of them, unless it is given.

    Raises:
        PlanError: a wrong option, or nothing to adapt.

    Source: section 3; the authors' code charges by "norm", joined in its default mode.

    Differs from the paper in that tasks start at random factors of their own, as in `lora`, not at
    a common start; and see `lora` for which layers.
    """
    _check("bora", tau, form, rows, mean)
    Options("bora").switch("joined", joined)
    plan = lora(base, r=r, alpha=alpha, dropout=dropout, target=target, exclude=exclude)
    options = {key: plan.options[key] for key in ("r", "alpha", "dropout", "target", "exclude")}
    stated = {"tau": tau, **options, "form": form, "rows": rows, "mean": mean, "joined": joined}
    if joined:
        tied = _joined(plan, base, tau, form, rows, mean)
    else:
        tied = tie_to_mean(plan, base, tau, form=form, rows=rows, mean=mean)
    return replace(tied, method="bora", options=stated)


def tie_to_mean(
    plan: Sharing,
    base: nn.Module,
    tau: float,
    *,
    form: Form = "squared",
    rows: float = 1.0,
    mean: Mean = "trained",
) -> Sharing:
    """A plan whose tasks are charged for the distance of what they own to a learned mean.

    Gated tensors (TAPS) are tied until their gates are final.

    Args:
        plan: any whose tasks only own tensors.
        base: that it is for.
        tau: precision, >= 0; 0 gives the plan itself.
        form: as for `bora`.
        rows: as for `bora`.
        mean: as for `bora`.

    Returns:
        The plan with a mean for each own floating-point parameter, which trains with all tasks
        unless it is given.

    Raises:
        PlanError: a number out of range, or a plan whose tasks share trained tensors already.
    """
    _check("tie_to_mean", tau, form, rows, mean)
    check_plan(base, plan)
    if tau == 0.0:
        return plan
    if not plan.only_owns:
        raise PlanError(
            f"The tasks of '{plan.method}' share trained tensors. Tie tasks that only own theirs."
        )
    start = {k: t for k, t in _fresh(plan, base).items() if isinstance(t, nn.Parameter)}
    if not start:
        raise PlanError(f"The tasks of '{plan.method}' own no tensors that could be tied.")
    if complex_ := [key for key, tensor in start.items() if tensor.is_complex()]:
        raise PlanError(f"A prior is over real numbers, and '{complex_[0]}' is complex.")
    trained = mean == "trained"
    means = {MEAN + key: Created(t.detach().clone()) for key, t in start.items()} if trained else {}
    charge = TieToMean(tau / rows, tuple(start), MEAN, form, trained)
    stated = {"tau": tau, "form": form, "rows": rows, "mean": mean}
    options = {**plan.options, "tie_to_mean": stated}
    return replace(plan, options=options, created=means, penalties=(*plan.penalties, charge))


def _joined(
    plan: Sharing, base: nn.Module, tau: float, form: Form, rows: float, mean: Mean
) -> Sharing:
    """The plan with a common branch beside each of the task's, which alone is charged for."""
    if mean == "given":
        raise PlanError("bora(joined=True) has no mean to give: its common branch is the model's.")
    if tau == 0.0:
        return plan
    start = _fresh(plan, base)
    adapters = {
        site: replace(branch, common=True)
        for site, branch in plan.adapters.items()
        if isinstance(branch, LowRank)
    }
    patches = {
        name: replace(patch, common=True)
        for name, patch in plan.patches.items()
        if isinstance(patch, LowRankSum)
    }
    created = {
        common: Created(start[own].detach())
        for name, patch in patches.items()
        for common, own in zip(common_keys(name), patch.keys(name), strict=True)
    }
    charge = TieToMean(tau / rows, tuple(start), None, form)
    return replace(plan, adapters=adapters, patches=patches, created=created, penalties=(charge,))


def _check(function: str, tau: float, form: str, rows: float, mean: str) -> None:
    given = Options(function)
    given.number("tau", tau, "[0, inf)")
    given.number("rows", rows, "(0, inf)")
    given.word("form", form, ("squared", "norm"))
    given.word("mean", mean, ("trained", "given"))


def _fresh(plan: Sharing, base: nn.Module) -> dict[str, Tensor]:
    """The own tensors of a new task; random numbers drawn for them change nothing else."""
    tensors = dict(named_tensors(base))
    with torch.random.fork_rng(devices=[]):
        own, _ = adapter_tensors(base, plan)
        for name, patch in plan.patches.items():
            own |= patch.init(name, tensors[name])
    return own
