"""Concrete subspace learning: a mask shared by all tasks, learned by entropy on unlabelled data.

Tang, Shen, Luo, Ding, Hu, Du, Tao, "Concrete Subspace Learning based Interference Elimination for
Multi-task Model Fusion", https://arxiv.org/abs/2312.06173; AdaMerging: Yang et al., ICLR 2024,
https://arxiv.org/abs/2310.02575.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.rows import select_output
from weft.errors import ConfigError, DataError
from weft.training.batches import split_batch, to_device
from weft.training.evaluation import device_of

from .merge import Merged, merged_model
from .vectors import Vector, base_of, check_tasks, task_vectors

Form = Literal["task_arithmetic", "task_wise", "layer_wise"]


@dataclass(frozen=True)
class _Vectors:
    """What is merged: the base, by tensor the changes of all tasks, and the mean statistics."""

    base: Mapping[str, Tensor]
    changes: Mapping[str, Tensor]  # (tasks, *shape)
    statistics: Mapping[str, Tensor]


@dataclass(frozen=True)
class Figures:
    """What was seen at a step of the training.

    Args:
        entropy: mean over tasks of the entropy of single predictions, in nats.
        diversity: mean over tasks of the entropy of the mean prediction of a batch, over the
            logarithm of the classes: 1 if all classes are predicted alike, 0 if only one is.
    """

    entropy: float
    diversity: float


def concrete(
    model: MultiTaskModel,
    data: Mapping[str, Any],
    tasks: Sequence[str] | None = None,
    *,
    form: Form = "task_arithmetic",
    masked: bool = True,
    scale: float = 0.3,
    temperature: float = 0.5,
    steps: int = 2000,
    lr: float = 1e-3,
    inner_lr: float = 1.0,
    scale_steps: int = 1000,
    scale_lr: float = 1e-3,
    clamp: bool = True,
    hard: bool = False,
    diversity: float = 0.0,
    seed: int = 0,
) -> Merged:
    """Merge tasks over a mask that is learned without labels; heads stay as they are.

    With logits x of the shape of the base, a mask is ``m = sigmoid((logit(u) + x) / temperature)``
    for uniform u, and task vectors become ``tau_t * m / mean(m)``, the mean over each tensor. The
    merged base is ``theta_0 + sum_t lambda_t tau_t m / mean(m)``. First the mask learns from the
    entropy of predictions; in the forms that learn lambda, each step resets lambda to ``scale``,
    takes one Adam step on it with the mask fixed, and moves the logits at the lambda reached, on
    fresh batches, without differentiating through the inner step. Then one mask is drawn and fixed,
    and lambda is learned.

    Args:
        model: holds the tasks; not changed.
        data: by task, batches of inputs, with or without targets, which are not looked at.
        tasks: which to merge; default all.
        form: "task_arithmetic" keeps lambda at ``scale``; "task_wise" learns one for each task,
            "layer_wise" one for each task and tensor (AdaMerging).
        masked: whether there is a mask; without one this is task arithmetic or AdaMerging itself.
        scale: lambda, or where it starts.
        temperature: of the mask, > 0.
        steps: of the mask, >= 1.
        lr: Adam's, for the logits.
        inner_lr: Adam's, for the step on lambda inside each step on the mask.
        scale_steps: of lambda, >= 1.
        scale_lr: Adam's, for lambda.
        clamp: whether lambda stays in [0, 1].
        hard: whether the final mask is 0 or 1, at m > 0.5.
        diversity: weight of the entropy of the mean prediction, which is maximised; 0 is the
            paper, more keeps predictions from collapsing.
        seed: of the masks.

    Returns:
        The merged model. ``warnings`` say if predictions collapsed to few classes: entropy is least
        where a network always answers the same, and nothing in the loss of the paper prevents it.

    Raises:
        TaskError, PlanError: as for `merge`.
        DataError: a task has no data, or its outputs are no class scores.
        ConfigError: an option out of range.

    Differs from the paper in that running statistics are the mean over the tasks.
    """
    chosen = check_tasks(model, model.task_names if tasks is None else tasks)
    _check(form, temperature, steps, scale_steps, diversity, chosen, data)
    base = base_of(model)
    found = list(task_vectors(model, chosen, base))
    vectors = _Vectors(
        base.parameters,
        {n: torch.stack([vector[n] for _, vector in found]) for n in base.parameters},
        {n: t + torch.stack([v[n] for _, v in found]).mean(0) for n, t in base.statistics.items()},
    )
    start = merged_model(model, chosen, {**base.parameters, **vectors.statistics}).eval()
    stage = _Stage(
        start, vectors, {t: _Stream(data[t], t, device_of(start)) for t in chosen}, diversity
    )
    generator = torch.Generator(device_of(start)).manual_seed(seed)
    logits = {n: torch.zeros_like(t, requires_grad=True) for n, t in base.parameters.items()}
    first = stage.figures(_plain_scales(vectors, form, scale), None)
    if masked:
        optimizer = torch.optim.Adam(list(logits.values()), lr=lr)
        for _ in range(steps):
            mask = _mask(logits, temperature, generator)
            scales = _plain_scales(vectors, form, scale)
            if form != "task_arithmetic":
                fixed = {n: m.detach() for n, m in mask.items()}
                scales = _moved(stage, scales, fixed, inner_lr, 1, clamp=clamp)
            optimizer.zero_grad()
            stage.loss(scales, mask).backward()
            optimizer.step()
    final = None
    if masked:
        with torch.no_grad():
            final = _mask(logits, temperature, generator)
            final = {n: (m > 0.5).to(m) for n, m in final.items()} if hard else final
    scales = _plain_scales(vectors, form, scale)
    if form != "task_arithmetic":
        scales = _moved(stage, scales, final, scale_lr, scale_steps, clamp=clamp)
    last = stage.figures(scales, final)
    with torch.no_grad():
        tensors = {**stage.tensors(scales, final), **vectors.statistics}
    how = f"{'concrete' if masked else 'adamerging'} {form}"
    return Merged(merged_model(model, chosen, tensors), how, scale, warnings=collapse(first, last))


def collapse(first: Figures, last: Figures) -> tuple[str, ...]:
    """A warning if predictions became sure by becoming all the same.

    Args:
        first: before training.
        last: after it.
    """
    if last.entropy < first.entropy and last.diversity < 0.8 * first.diversity:
        return (
            f"Predictions collapsed: their entropy fell from {first.entropy:.3f} to "
            f"{last.entropy:.3f}, and with it how evenly classes are predicted, from "
            f"{first.diversity:.2f} to {last.diversity:.2f}. Compare with task arithmetic on "
            "labelled validation data, use fewer steps, or diversity=1.",
        )
    return ()


def _check(
    form: str,
    temperature: float,
    steps: int,
    scale_steps: int,
    diversity: float,
    tasks: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    forms = ("task_arithmetic", "task_wise", "layer_wise")
    if form not in forms:
        raise ConfigError(f"concrete(form=...) is one of {', '.join(forms)}; found {form!r}.")
    if not 0 < temperature < math.inf or steps < 1 or scale_steps < 1 or diversity < 0:
        raise ConfigError(
            "concrete expects temperature > 0, steps and scale_steps >= 1 and diversity >= 0; "
            f"found {temperature}, {steps}, {scale_steps} and {diversity}."
        )
    missing = [task for task in tasks if task not in data]
    if missing:
        raise DataError(f"{', '.join(missing)} has no data. Give batches of inputs for every task.")


class _Stream:
    """Batches of one task's inputs, without end."""

    def __init__(self, batches: Any, task: str, device: torch.device) -> None:
        self._batches, self._task, self._device = batches, task, device
        self._running: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The inputs of the next batch, from the start again after the last one."""
        batch = next(self._running, None)
        if batch is None:
            self._running = iter(self._batches)
            batch = next(self._running, None)
        if batch is None:
            raise DataError(f"The data of '{self._task}' is empty.")
        inputs = batch if isinstance(batch, Tensor) else split_batch(batch, self._task)[0]
        return to_device(inputs, self._device)


class _Stage:
    """The network on merged tensors, and what it is trained for."""

    def __init__(
        self,
        model: MultiTaskModel,
        vectors: _Vectors,
        streams: Mapping[str, _Stream],
        diversity: float,
    ) -> None:
        self._model, self._vectors, self._streams = model, vectors, streams
        self._diversity = diversity
        self._fixed = {n: t for n, t in _constants(model).items() if n not in vectors.base}

    def tensors(self, scales: Tensor, mask: Vector | None) -> dict[str, Tensor]:
        """theta_0 + sum_t lambda_t tau_t m / mean(m), by tensor; scales are (tasks, tensors)."""
        merged = {}
        for place, (name, base) in enumerate(self._vectors.base.items()):
            step = torch.tensordot(scales[:, place].to(base), self._vectors.changes[name], 1)
            if mask is not None:
                step = step * mask[name] / mask[name].mean().clamp(min=1e-8)
            merged[name] = base + step
        return merged

    def loss(self, scales: Tensor, mask: Vector | None) -> Tensor:
        """Mean entropy of the tasks' predictions on their next batches."""
        entropies, spreads = self._predicted(scales, mask)
        return torch.stack(entropies).mean() - self._diversity * torch.stack(spreads).mean()

    @torch.no_grad()
    def figures(self, scales: Tensor, mask: Vector | None) -> Figures:
        """Entropy and diversity on the next batches."""
        entropies, spreads = self._predicted(scales, mask, relative=True)
        return Figures(float(torch.stack(entropies).mean()), float(torch.stack(spreads).mean()))

    def _predicted(
        self, scales: Tensor, mask: Vector | None, *, relative: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        tensors = {**self._fixed, **self.tensors(scales, mask)}
        entropies, spreads = [], []
        for task, stream in self._streams.items():
            view = self._model.view(task).bind(tensors)
            inputs = stream.next()
            output = view(**inputs) if isinstance(inputs, Mapping) else view(inputs)
            head = self._model.head(task)
            features = select_output(output, self._model.output)
            logits = features if head is None else head(features)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
                raise DataError(
                    f"The outputs of '{task}' are no class scores of shape (rows, classes); "
                    "entropy has no meaning there. Merge it by another rule."
                )
            logs = logits.log_softmax(1)
            entropies.append(-(logs.exp() * logs).sum(1).mean())
            mean = logs.exp().mean(0)
            spread = -(mean * mean.clamp(min=1e-12).log()).sum()
            spreads.append(spread / math.log(logits.shape[1]) if relative else spread)
        return entropies, spreads


def _constants(model: MultiTaskModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.tensors(model.task_names[0]).items()}


def _plain_scales(vectors: _Vectors, form: Form, scale: float) -> Tensor:
    """Every task's scale of every tensor, (tasks, tensors); one column if they are task-wise."""
    first = next(iter(vectors.changes.values()))
    count = len(vectors.base)
    columns = torch.full(
        (len(first), 1 if form == "task_wise" else count), scale, device=first.device
    )
    return columns.expand(-1, count) if form == "task_wise" else columns


def _moved(
    stage: _Stage, scales: Tensor, mask: Vector | None, lr: float, steps: int, *, clamp: bool
) -> Tensor:
    """Scales after Adam steps on the entropy, with the mask fixed; constants again."""
    task_wise = scales.stride(1) == 0
    free = (scales[:, :1] if task_wise else scales).detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(free.expand_as(scales), mask).backward()
        optimizer.step()
        if clamp:
            with torch.no_grad():
                free.clamp_(0.0, 1.0)
    return free.detach().expand_as(scales)


def _mask(logits: Vector, temperature: float, generator: torch.Generator) -> Vector:
    """One sample of the relaxed mask."""
    found = {}
    for name, x in logits.items():
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        found[name] = torch.sigmoid((torch.logit(u, eps=1e-6) + x) / temperature)
    return found
