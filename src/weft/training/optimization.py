"""Optimiser groups as plans recommend them, and weight decay that knows where home is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from weft.core.model import MultiTaskModel
from weft.core.sharing import Group
from weft.core.sites import named_tensors
from weft.errors import ConfigError, close_matches

Groups = list[dict[str, Any]]
"""Parameter groups of torch: ``{"params": [...], "lr": ..., "weight_decay": ..., "name": ...}``."""

OptimizerChoice = Literal["sgd", "adamw"] | Callable[[Groups], Optimizer]


def parameter_groups(
    model: MultiTaskModel,
    tasks: Iterable[str],
    *,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> Groups:
    """What trains when these tasks are fitted, grouped as their plans recommend.

    Tuned copies of base tensors (TAPS) are grouped without decay: theirs must pull towards the
    base. `fit` adds it; in a loop of one's own see `anchors`.

    Args:
        model: the model.
        tasks: names of the tasks.
        lr: learning rate.
        head_lr: learning rate of the heads; default ``lr``.
        weight_decay: for groups that take decay.

    Returns:
        Groups for any torch optimiser.
    """
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def put(kind: str, parameter: nn.Parameter, rate: float, decay: float) -> None:
        found.setdefault((kind, rate, decay), []).append(parameter)

    for task in tasks:
        plan = model.plan(task)
        anchored = {key for key, _ in anchors(model, task)}
        for key, parameter in model.trainable(task).items():
            group = _group_of(plan.groups, key)
            decay = weight_decay if group.decay and key not in anchored else 0.0
            put("own", parameter, lr * group.lr, decay)
        head = model.head(task)
        for parameter in [] if head is None else head.parameters():
            if parameter.requires_grad:
                put("head", parameter, lr if head_lr is None else head_lr, weight_decay)
    for key, parameter in model.shared_trainable().items():
        group = _group_of(model.sharing.groups, key)
        put("shared", parameter, lr * group.lr, weight_decay if group.decay else 0.0)
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "name": kind}
        for (kind, rate, decay), params in found.items()
    ]


def _group_of(groups: tuple[Group, ...], key: str) -> Group:
    return next((g for g in groups if g.takes(key)), Group(match=("*",)))


def anchors(model: MultiTaskModel, task: str) -> list[tuple[str, Tensor]]:
    """Own tensors that weight decay pulls towards a base tensor: ``[(key, base tensor)]``."""
    state = model.tasks[task]
    base = dict(named_tensors(model.base))
    return [(k, base[n]) for n, p in state.patches.items() for k in p.anchored(n)]


@dataclass(frozen=True)
class PullToBase:
    """Weight decay of tuned copies of base tensors, towards the base.

    With D = tuned - base this is the decay of the residual D, so that the tuned form of TAPS equals
    the residual form: grad + decay * D for SGD, and D - lr * decay * D after a step of AdamW.

    Args:
        pairs: own parameters, each with its base tensor.
        decay: the weight decay.
        decoupled: AdamW's form.
    """

    pairs: tuple[tuple[nn.Parameter, Tensor], ...]
    decay: float
    decoupled: bool

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the decay to gradients, for optimisers that decay so."""
        if self.decay and not self.decoupled:
            for parameter, base in self.pairs:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - base, alpha=self.decay)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Pull by ``lr * decay``, for optimisers that decay apart from the gradient."""
        if self.decay and self.decoupled:
            for parameter, base in self.pairs:
                parameter.lerp_(base, lr * self.decay)


def make_optimizer(choice: OptimizerChoice, groups: Groups, momentum: float) -> Optimizer:
    """The optimiser for the groups.

    Raises:
        ConfigError: an unknown name.
    """
    if not isinstance(choice, str):
        return choice(groups)
    if choice == "sgd":
        return SGD(groups, momentum=momentum)
    if choice == "adamw":
        return AdamW(groups)
    hint = close_matches(choice, ["sgd", "adamw"])
    raise ConfigError(
        f"optimizer is 'sgd', 'adamw' or a function of groups, found {choice!r}.{hint}"
    )
