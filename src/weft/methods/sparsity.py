"""How DiSparse chooses the weights that stay: scores by task, and the arbiter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.core.masks import KEEP, head_key, head_weights, shared_key
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.errors import PlanError

Score = Literal["saliency", "magnitude", "taylor"]
Weights = Literal["own", "xavier"]

OVERLAP = "overlap"
"""Key of the created tensor with the overlap of the tasks' masks, (layers,)."""

HEAD = "head:"
"""Prefix of the names of a head's weights among the weights of a task."""


# ------------------------------------------------------------------- what a task's network is


def task_weights(model: MultiTaskModel, task: str, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The weights of a task's network: shared ones, and those of its head as ``head:<name>``."""
    tensors = dict(named_tensors(model.base))
    shared = {n: p for n in names if isinstance(p := tensors[n], nn.Parameter)}
    return {**shared, **{HEAD + n: p for n, p in head_weights(model.head(task)).items()}}


def buffer_of(model: MultiTaskModel, task: str, name: str, buffer: str = KEEP) -> Tensor:
    """The mask, or another buffer, of one of these weights."""
    if name.startswith(HEAD):
        return model.tasks[task].own[head_key(name.removeprefix(HEAD), buffer)]
    return model.shared[shared_key(name, buffer)]


@torch.no_grad()
def set_mask(model: MultiTaskModel, task: str, name: str, weight: Tensor, keep: Tensor) -> None:
    """Give a weight a mask; what it leaves out becomes zero."""
    buffer_of(model, task, name).copy_(keep)
    weight.masked_fill_(~keep, 0)


def task_gradients(
    model: MultiTaskModel, task: str, names: Sequence[str], batches: Iterable[tuple[Any, Any]]
) -> dict[str, Tensor]:
    """sum_batches abs(dL_t/dw) with the task's own loss, unweighted, by weight.

    The forward is one of training, for statistics of networks that were never trained mean nothing.
    """
    weights = task_weights(model, task, names)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    loss_of = model.tasks[task].task.loss
    for x, y in batches:
        with torch.enable_grad():
            loss = loss_of(model.step({task: x}, charge={task: 0.0}).outputs[task], y)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                sums[name] += gradient.abs()
    return sums


def apart(model: MultiTaskModel, names: Iterable[str]) -> MultiTaskModel:
    """A copy in training mode to differentiate; the model itself keeps its statistics."""
    probe = copy.deepcopy(model).train()
    for task in probe.task_names:
        for weight in task_weights(probe, task, names).values():
            weight.requires_grad_()
    return probe


def all_weights(model: MultiTaskModel, names: Iterable[str]) -> dict[tuple[str, str], nn.Parameter]:
    """Every different weight by task ("" for what is shared) and name."""
    found: dict[tuple[str, str], nn.Parameter] = {}
    for task in model.task_names:
        for name, weight in task_weights(model, task, names).items():
            found[(task if name.startswith(HEAD) else "", name)] = weight
    return found


# ------------------------------------------------------------------------ scores and the arbiter


@dataclass(frozen=True)
class Prune:
    """A preparation: every task ranks, the arbiter keeps.

    Args:
        names: of the weights of the base.
        sparsity: the share of zeros, heads included.
        score: what weights are ranked by.
        batches: of each task, that gradients are taken on.
        weights: which weights are ranked.
        seed: of weights that are drawn anew.
    """

    names: tuple[str, ...]
    sparsity: float
    score: Score
    batches: int
    weights: Weights
    seed: int

    def __call__(self, model: MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:
        """Set masks, and weights that they leave out to zero."""
        scores = self.scores(model, data)
        weights = {task: task_weights(model, task, self.names) for task in scores}
        ranked = {
            task: places(of_task, {n: w.detach().abs() for n, w in weights[task].items()})
            for task, of_task in scores.items()
        }
        keep = arbitrate(ranked, self.sparsity)
        for task, masks in keep.items():
            for name in self.names:
                together = torch.stack([other[name] for other in keep.values()]).any(0)
                set_mask(model, task, name, weights[task][name], together)
            for name in masks.keys() - set(self.names):
                set_mask(model, task, name, weights[task][name], masks[name])
        note_overlap(model, self.names, keep)

    def scores(
        self, model: MultiTaskModel, data: Mapping[str, Iterable[Any]]
    ) -> dict[str, dict[str, Tensor]]:
        """By task and weight, what it is ranked by; each task's scores sum to 1."""
        probe = apart(model, self.names)
        if self.weights == "xavier":
            _draw_anew(probe, self.names, self.seed)
        found = {}
        for task, batches in data.items():
            weights = {n: w.detach() for n, w in task_weights(probe, task, self.names).items()}
            if self.score == "magnitude":
                scores = {name: weight.abs() for name, weight in weights.items()}
            else:
                some = islice(batches, self.batches)
                gradients = task_gradients(probe, task, self.names, some)
                power = 1 if self.score == "saliency" else 2
                scores = {n: g * weights[n].abs() ** power for n, g in gradients.items()}
            total = sum(float(s.double().sum()) for s in scores.values()) or 1.0
            found[task] = {name: s / total for name, s in scores.items()}
        return found


def places(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The place of every weight among all of a task's, best first, over their number: in (0, 1].

    Args:
        scores: by weight.
        sizes: by weight, what goes before among equal scores, larger first: weights that a loss
            does not feel all score 0, those that are zero and those that are not.
    """
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    order = torch.cat([sizes[name].reshape(-1) for name in scores]).argsort(
        descending=True, stable=True
    )
    order = order[flat[order].argsort(descending=True, stable=True)]
    place = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
    place[order] = torch.arange(1, len(flat) + 1, device=flat.device).double() / len(flat)
    parts = place.split([s.numel() for s in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def arbitrate(
    ranked: Mapping[str, Mapping[str, Tensor]], sparsity: float
) -> dict[str, dict[str, Tensor]]:
    """By task, what it keeps: its best share rho, the same for all tasks.

    A shared weight stays if the best of its places in the tasks is at most rho, a weight of a head
    if its only place is. So rho is the order statistic of these places that keeps as many weights
    as the sparsity asks for; equal places of different tasks may keep some more, fewer than there
    are tasks.

    Args:
        ranked: by task and weight, places in (0, 1].
        sparsity: the share of all different weights that are zero.
    """
    tasks = list(ranked.values())
    best = [
        torch.stack([places[name] for places in tasks]).amin(0).reshape(-1)
        for name in tasks[0]
        if not name.startswith(HEAD)
    ]
    heads = [p.reshape(-1) for places in tasks for n, p in places.items() if n.startswith(HEAD)]
    pool = torch.cat([*best, *heads])
    kept = max(1, round((1.0 - sparsity) * len(pool)))
    rho = pool.kthvalue(kept).values
    return {task: {n: place <= rho for n, place in of.items()} for task, of in ranked.items()}


@torch.no_grad()
def note_overlap(
    model: MultiTaskModel, names: Sequence[str], keep: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write down, by layer, how alike the tasks' masks are: the mean over pairs of their IoU."""
    pairs = list(combinations(keep.values(), 2))
    for place, name in enumerate(names):
        ious = [_over_union(one[name], other[name]) for one, other in pairs]
        model.shared[OVERLAP][place] = sum(ious) / len(ious) if ious else 1.0


def _over_union(one: Tensor, other: Tensor) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


def _draw_anew(model: MultiTaskModel, names: Sequence[str], seed: int) -> None:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        drawn: set[int] = set()
        for task in model.task_names:
            for weight in task_weights(model, task, names).values():
                if id(weight) not in drawn:
                    drawn.add(id(weight))
                    nn.init.xavier_normal_(weight.data)


# ------------------------------------------------------------------------------------- looking


def zeros(model: MultiTaskModel) -> float:
    """The share of all weights with a mask, shared and of all heads, that are zero.

    Raises:
        PlanError: the model is not of disparse.
    """
    _refuse_others("zeros", model)
    names = sorted(model.sharing.masked)
    # Without tasks there are no heads, and the shared weights are as they are.
    shared = {("", name): model.base.get_parameter(name) for name in names}
    weights = {**shared, **all_weights(model, names)}.values()
    count = sum(w.numel() for w in weights)
    return 1.0 - sum(int(w.detach().count_nonzero()) for w in weights) / count


def overlap(model: MultiTaskModel) -> dict[str, float]:
    """By layer, how alike what the tasks kept (or last grew) is: the mean over pairs of its IoU.

    Raises:
        PlanError: the model is not of disparse.
    """
    _refuse_others("overlap", model)
    names = [key.removesuffix(f":{KEEP}") for key in model.sharing.created if key.endswith(KEEP)]
    return dict(zip(names, model.shared[OVERLAP].tolist(), strict=True))


def _refuse_others(function: str, model: MultiTaskModel) -> None:
    if not model.sharing.masked:
        raise PlanError(
            f"{function} looks at the masks of disparse; the plan of this model is "
            f"'{model.sharing.method}', which has none."
        )
