"""Concrete subspace learning: a mask shared by all tasks, learned by entropy on unlabelled data.

Tang, Shen, Luo, Ding, Hu, Du, Tao, "Concrete Subspace Learning based Interference Elimination for
Multi-task Model Fusion", https://arxiv.org/abs/2312.06173; AdaMerging: Yang et al., ICLR 2024,
https://arxiv.org/abs/2310.02575.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.options import Options
from weft.errors import ConfigError, TrainingError
from weft.training.evaluation import device_of

from .entropy import Predictions, Stream, collapse
from .merged import Merged, merged_model
from .options import check_data
from .source import Source, check_source, chosen_tasks, opened
from .vectors import Vector, base_of, precise, refuse_complex, task_vectors

Form = Literal["task_arithmetic", "task_wise", "layer_wise"]


def concrete(
    source: Source,
    data: Mapping[str, Any],
    tasks: Iterable[str] | str | None = None,
    *,
    base: nn.Module | None = None,
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
    progress: bool = True,
) -> Merged:
    """Merge tasks over a mask that is learned without labels; heads stay as they are.

    With logits x of the shape of the base, a mask is ``m = sigmoid((logit(u) + x) / temperature)``
    for uniform u, and task vectors become ``tau_t * m / mean(m)``, the mean over each tensor. The
    merged base is ``theta_0 + sum_t lambda_t tau_t m / mean(m)``. First the mask learns from the
    entropy of predictions; in the forms that learn lambda, each step resets lambda to ``scale``,
    takes one Adam step on it with the mask fixed, and moves the logits at the lambda reached, on
    fresh batches, without differentiating through the inner step. Then one mask is drawn and fixed,
    and lambda is learned. Logits, lambda and what is merged are in float32 at least, whatever the
    base is in.

    Args:
        source: holds the tasks: a model, which is not changed, or a bank, loaded as by
            ``bank.load(base, *tasks)``.
        data: by task, batches of inputs, with or without targets, which are not looked at. They
            are read again from the start after the last one.
        tasks: which to merge, or the name of one; default all.
        base: of a bank, the module that its tasks were trained on.
        form: "task_arithmetic" keeps lambda at ``scale``; "task_wise" learns one for each task,
            "layer_wise" one for each task and tensor (AdaMerging).
        masked: whether there is a mask; without one this is task arithmetic or AdaMerging itself.
        scale: lambda, or where it starts; finite.
        temperature: of the mask, > 0.
        steps: of the mask, >= 1.
        lr: Adam's, for the logits, > 0.
        inner_lr: Adam's, for the step on lambda inside each step on the mask, > 0.
        scale_steps: of lambda, >= 1.
        scale_lr: Adam's, for lambda, > 0.
        clamp: whether lambda stays in [0, 1].
        hard: whether the final mask is 0 or 1, at m > 0.5.
        diversity: weight of the entropy of the mean prediction, which is maximised, >= 0; 0 is the
            paper, more keeps predictions from collapsing.
        seed: of the masks.
        progress: whether to show progress, on standard error.

    Returns:
        The merged model. ``warnings`` say if predictions collapsed to few classes: entropy is least
        where a network always answers the same, and nothing in the loss of the paper prevents it.

    Raises:
        TaskError, BankError, PlanError: as for `merge`.
        DataError: a task has no data, or its outputs are no class scores.
        ConfigError: an option out of range.
        TrainingError: an entropy or a merged tensor is not finite.

    Source: sections 3 and 4 of the paper; temperature, steps and rates are its authors'.

    Differs from the paper in that running statistics are the mean over the tasks.
    """
    check_source("concrete", source, base)
    names = chosen_tasks(source, tasks)
    given = Options("concrete", ConfigError)
    given.word("form", form, ("task_arithmetic", "task_wise", "layer_wise"))
    given.number("scale", scale)
    positive = {"temperature": temperature, "lr": lr, "inner_lr": inner_lr, "scale_lr": scale_lr}
    for option, value in positive.items():
        given.number(option, value, "(0, inf)")
    given.number("diversity", diversity, "[0, inf)")
    for option, count in {"steps": steps, "scale_steps": scale_steps}.items():
        given.whole(option, count, 1)
    given.seed("seed", seed)
    for option, switch in {"masked": masked, "clamp": clamp, "hard": hard}.items():
        given.switch(option, switch)
    check_data("concrete", data, names)
    model = opened(source, names, base)
    # The caller may have turned gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        vectors = _vectors(model, names)
        start = merged_model(model, names, {**vectors.base, **vectors.statistics})
        start.eval().requires_grad_(False)
        streams = {task: Stream(data[task], task, device_of(start)) for task in names}
        predictions = Predictions(start, streams, diversity)
        learned = form != "task_arithmetic"
        plain = vectors.scales(form, scale)
        first = predictions.figures(vectors.merged(plain, None))
        mask = None
        if masked:
            masks = _Masks(vectors.base, temperature, seed)
            optimizer = torch.optim.Adam(list(masks.logits.values()), lr=lr)
            for _ in _shown(range(steps), "mask", progress):
                drawn = masks.draw()
                scales = plain
                if learned:
                    fixed = {name: m.detach() for name, m in drawn.items()}
                    inner = _ScaleSteps(predictions, vectors, fixed, inner_lr, clamp)
                    scales = inner.from_start(plain, range(1))
                optimizer.zero_grad()
                predictions.loss(vectors.merged(scales, drawn)).backward()
                optimizer.step()
            mask = masks.final(hard=hard)
        scales = plain
        if learned:
            outer = _ScaleSteps(predictions, vectors, mask, scale_lr, clamp)
            scales = outer.from_start(plain, _shown(range(scale_steps), "scales", progress))
        tensors = vectors.merged(scales, mask)
        last = predictions.figures(tensors)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"Merging made '{name}' NaN or infinite. Lower lr and scale, or merge on a base in "
                "float32."
            )
    merged = merged_model(model, names, {**tensors, **vectors.statistics})
    how = f"{'concrete' if masked else 'adamerging'} {form}"
    return Merged(merged, how, float(scale), warnings=collapse(first, last))


@dataclass(frozen=True)
class _Vectors:
    """What is merged: the base, by tensor the changes of all tasks, and the mean statistics."""

    base: Mapping[str, Tensor]
    changes: Mapping[str, Tensor]  # (tasks, *shape), in float32 at least
    statistics: Mapping[str, Tensor]

    def scales(self, form: Form, scale: float) -> Tensor:
        """Where scales start: (tasks, tensors), or (tasks, 1) if a task has one for all tensors."""
        changes = list(self.changes.values())
        count = 1 if form == "task_wise" else len(changes)
        dtype = torch.float64 if any(c.dtype == torch.float64 for c in changes) else torch.float32
        return torch.full((len(changes[0]), count), scale, dtype=dtype, device=changes[0].device)

    def merged(self, scales: Tensor, mask: Vector | None) -> Vector:
        """theta_0 + sum_t lambda_t tau_t m / mean(m), by tensor."""
        wide = scales.expand(-1, len(self.base))
        found = {}
        for place, (name, tensor) in enumerate(self.base.items()):
            change = self.changes[name]
            step = torch.tensordot(wide[:, place].to(change), change, 1)
            if mask is not None:
                step = step * mask[name] / mask[name].mean().clamp(min=1e-8)
            found[name] = (tensor + step).to(tensor.dtype)
        return found


def _vectors(model: MultiTaskModel, names: Sequence[str]) -> _Vectors:
    base = base_of(model)
    refuse_complex(base, "concrete")
    found = [vector for _, vector in task_vectors(model, names, base)]
    mean = {n: torch.stack([v[n] for v in found]).mean(0) for n in base.statistics}
    return _Vectors(
        base.parameters,
        {name: torch.stack([vector[name] for vector in found]) for name in base.parameters},
        {n: (precise(t) + mean[n]).to(t.dtype) for n, t in base.statistics.items()},
    )


class _Masks:
    """The logits of the mask, in float32 at least, and what is drawn by them."""

    def __init__(self, base: Mapping[str, Tensor], temperature: float, seed: int) -> None:
        self.logits = {n: torch.zeros_like(precise(t), requires_grad=True) for n, t in base.items()}
        self._temperature = temperature
        device = next(iter(base.values())).device
        self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self) -> Vector:
        """One sample of the relaxed mask."""
        found = {}
        for name, x in self.logits.items():
            u = torch.rand(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)
            found[name] = torch.sigmoid((torch.logit(u, eps=1e-6) + x) / self._temperature)
        return found

    @torch.no_grad()
    def final(self, *, hard: bool) -> Vector:
        """The sample that stays: a constant, of zeros and ones if it is hard."""
        found = self.draw()
        return {name: (m > 0.5).to(m) for name, m in found.items()} if hard else found


@dataclass(frozen=True)
class _ScaleSteps:
    """Adam on the scales by the entropy, with the mask fixed."""

    predictions: Predictions
    vectors: _Vectors
    mask: Vector | None
    lr: float
    clamp: bool

    def from_start(self, start: Tensor, steps: Iterable[int]) -> Tensor:
        """The scales after the steps; constants again."""
        free = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=self.lr)
        for _ in steps:
            optimizer.zero_grad()
            self.predictions.loss(self.vectors.merged(free, self.mask)).backward()
            optimizer.step()
            if self.clamp:
                with torch.no_grad():
                    free.clamp_(0.0, 1.0)
        return free.detach()


def _shown(steps: range, stage: str, progress: bool) -> Iterator[int]:
    """The steps, with a bar on a terminal and a line elsewhere."""
    console = Console(stderr=True)
    if not progress:
        yield from steps
    elif console.is_terminal:
        yield from track(steps, f"learning the {stage}", console=console)
    else:
        yield from steps
        console.print(f"learned the {stage} in {len(steps)} steps", highlight=False)
