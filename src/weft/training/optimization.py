"""Optimiser groups as plans recommend them, and weight decay that knows where home is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
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
    apart: Mapping[str, Hashable] | None = None,
) -> Groups:
    """What trains when these tasks are fitted, grouped as their plans recommend.

    Tuned copies of base tensors (TAPS) are grouped without decay: theirs pulls towards the base,
    see `PullToBase`.

    Args:
        model: the model.
        tasks: names of the tasks.
        lr: learning rate.
        head_lr: learning rate of the heads; default ``lr``.
        weight_decay: for groups that take decay.
        apart: by task; tasks for which it differs are in no group together.

    Returns:
        Groups for any torch optimiser.
    """
    names = list(tasks)
    found: dict[tuple[str, float, float, Hashable], list[nn.Parameter]] = {}

    def put(kind: str, task: str, parameter: nn.Parameter, rate: float, decay: float) -> None:
        key = (kind, rate, decay, (apart or {}).get(task))
        found.setdefault(key, []).append(parameter)

    for task in names:
        groups = model.plan(task).groups
        anchored = _anchors(model, task)
        for key, parameter in model.trainable(task).items():
            group = _group_of(groups, key)
            decay = weight_decay if group.decay and key not in anchored else 0.0
            put("own", task, parameter, lr * group.lr, decay)
        head = model.head(task)
        for parameter in [] if head is None else head.parameters():
            if parameter.requires_grad:
                put("head", task, parameter, lr if head_lr is None else head_lr, weight_decay)
    for task in [t for t in names if model.plan(t) is model.sharing][:1]:
        for key, parameter in model.shared_trainable().items():
            group = _group_of(model.sharing.groups, key)
            put("shared", task, parameter, lr * group.lr, weight_decay if group.decay else 0.0)
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "name": kind}
        for (kind, rate, decay, _), params in found.items()
    ]


def _group_of(groups: tuple[Group, ...], key: str) -> Group:
    return next((g for g in groups if g.takes(key)), Group(match=("*",)))


def _anchors(model: MultiTaskModel, task: str) -> dict[str, Tensor]:
    """The base tensor that weight decay pulls an own tensor towards, by the own tensor's key."""
    base = dict(named_tensors(model.base))
    patches = model.tasks[task].patches
    return {key: base[name] for name, patch in patches.items() for key in patch.anchored(name)}


class PullToBase:
    """Weight decay of tuned copies of base tensors, towards the base; call it before each step.

    With D = tuned - base this is the decay of the residual D, so that the tuned form of TAPS equals
    the residual form: grad + decay * D, or D * (1 - lr * decay) before the step of an AdamW.

    Args:
        model: the model.
        tasks: names of the tasks.
        optimizer: over groups of `parameter_groups`.
        weight_decay: the decay.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Iterable[str],
        optimizer: Optimizer,
        weight_decay: float,
    ) -> None:
        self._optimizer = optimizer
        self._decay = weight_decay
        self._homes: dict[int, Tensor] = {}
        for task in tasks:
            own, groups = model.trainable(task), model.plan(task).groups
            for key, base in _anchors(model, task).items():
                if weight_decay and key in own and _group_of(groups, key).decay:
                    self._homes[id(own[key])] = base

    @torch.no_grad()
    def __call__(self) -> None:
        """Pull what has a gradient; what has none is frozen."""
        # Not a hook of the optimiser: a class that derives from torch's would run it twice.
        for group in self._optimizer.param_groups if self._homes else []:
            for parameter in group["params"]:
                base = self._homes.get(id(parameter))
                if base is None or parameter.grad is None:
                    continue
                if isinstance(self._optimizer, AdamW):
                    parameter.lerp_(base, group["lr"] * self._decay)
                else:
                    parameter.grad.add_(parameter - base, alpha=self._decay)


def make_optimizer(choice: OptimizerChoice, groups: Groups, momentum: float) -> Optimizer:
    """The optimiser for the groups.

    Raises:
        ConfigError: an unknown name, or a function that returned something else.
    """
    if not isinstance(choice, str):
        optimizer = choice(groups)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                "optimizer as a function of groups returns a torch.optim.Optimizer, found "
                f"{type(optimizer).__name__}."
            )
        return optimizer
    if choice == "sgd":
        return SGD(groups, momentum=momentum)
    if choice == "adamw":
        return AdamW(groups)
    hint = close_matches(choice, ["sgd", "adamw"])
    raise ConfigError(
        f"optimizer is 'sgd', 'adamw' or a function of groups, found {choice!r}.{hint}"
    )
