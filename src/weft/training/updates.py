"""The optimiser steps of a run: groups, schedules, clipping, and the pull towards the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from weft.core.masks import masked
from weft.core.model import MultiTaskModel
from weft.errors import ConfigError, PlanError, TrainingError

from .optimization import OptimizerChoice, PullToBase, make_optimizer, parameter_groups
from .schedule import rate_factor
from .settings import Settings


class Updates:
    """Takes the optimiser steps of a run.

    Args:
        model: the model.
        tasks: those that are fitted.
        courses: by task, the optimiser steps of the parts of its run; the learning rate runs
            through its schedule in each.
        settings: what was asked for.
        optimizer: a name or a function of parameter groups.
        accelerator: device, precision and processes.

    Raises:
        PlanError: nothing trains.
        ConfigError: no optimiser, or one that mixes groups of different schedules.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: tuple[str, ...],
        courses: Mapping[str, tuple[int, ...]],
        settings: Settings,
        optimizer: OptimizerChoice,
        accelerator: Accelerator,
    ) -> None:
        self.done = 0
        groups = parameter_groups(
            model,
            tasks,
            lr=settings.lr,
            head_lr=settings.head_lr,
            weight_decay=settings.weight_decay,
            apart=courses,
        )
        if not groups:
            raise PlanError(
                f"Nothing trains for {', '.join(tasks)}: the plan owns nothing that trains and the "
                "head has no parameters that train."
            )
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._find_masked = partial(masked, model, tasks)
        self._masked: list[tuple[nn.Parameter, Tensor]] = []
        self._clip = settings.clip
        self._lr = settings.lr
        self._accelerator = accelerator
        self._inner = make_optimizer(optimizer, groups, settings.momentum)
        self._prepared = accelerator.prepare(self._inner)
        self._pull = PullToBase(model, tasks, self._inner, settings.weight_decay)
        self._rates: list[float] = [group["lr"] for group in self._inner.param_groups]
        self._factors = {
            task: rate_factor(settings.schedule, course, settings.warmup_steps)
            for task, course in courses.items()
        }
        trained = {id(p): task for task in tasks for p in model.task_parameters(task)}
        together = next((t for t in tasks if model.plan(t) is model.sharing), tasks[0])
        self._leading: list[str] = []
        for group in self._inner.param_groups:
            mine = list(dict.fromkeys(trained.get(id(p), together) for p in group["params"]))
            if len({courses[task] for task in mine}) > 1:
                raise ConfigError(
                    f"The optimiser puts parameters of {' and '.join(mine)} into one group, but a "
                    "plan begins its schedule anew on the way: keep the groups that it was given."
                )
            self._leading.append(mine[0] if mine else together)

    def __call__(self) -> None:
        """One optimiser step with the gradients that are there."""
        groups = zip(self._inner.param_groups, self._rates, self._leading, strict=True)
        for group, rate, task in groups:
            group["lr"] = rate * self._factors[task](self.done)
        for weight, mask in self._masked:
            if weight.grad is not None:
                weight.grad.mul_(mask)
        if self._clip is not None:
            self._accelerator.clip_grad_norm_(self.parameters, self._clip)
        elif self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self._prepared)
        self._pull()
        self._prepared.step()
        self.done += 1

    def rate(self, task: str) -> float:
        """The learning rate of the last step, as given to `fit`, without the factors of groups."""
        return self._lr * self._factors[task](self.done - 1)

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        """Let what masks leave out be zero, and the optimiser remember nothing of it.

        With gradients that are masked it stays so until the masks change. Call it before the first
        step, too: what prepares a model for several processes puts other buffers in place.
        """
        self._masked = self._find_masked()
        for weight, mask in self._masked:
            remembered = self._inner.state.get(weight, {}).values()
            for tensor in (weight, *remembered):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    tensor.masked_fill_(~mask, 0)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Drop what the optimiser remembers of some tensors."""
        for tensor in tensors:
            self._inner.state.pop(tensor, None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        scaler = self._accelerator.scaler
        return {
            "updates": self.done,
            "optimizer": self._inner.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: it is of another optimiser.
        """
        try:
            self._inner.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"The checkpoint does not fit this optimiser: {error}. Remove it to start anew."
            ) from error
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self.done = state["updates"]
