"""Concrete merging against a reference of its own, which shares no function with it.

Plain loops over tasks, tensors and steps in float64, with Adam and the sigmoid written out, and
gradients by autograd. Random draws and the order of batches are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.merging import concrete

TASKS = ("a", "b")
NAMES = ("0.weight", "0.bias", "2.weight")
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (3, 4)}


@dataclass
class Problem:
    """Tensors and inputs, as they are: nothing of weft."""

    start: dict[str, Tensor]
    tuned: dict[str, dict[str, Tensor]]
    heads: dict[str, tuple[Tensor, Tensor]]
    inputs: dict[str, list[Tensor]]


def problem() -> Problem:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = {n: normal(*SHAPES[n]) for n in NAMES}
    return Problem(
        start,
        {t: {n: start[n] + 0.7 * normal(*SHAPES[n]) for n in NAMES} for t in TASKS},
        {"a": (normal(3, 3), normal(3)), "b": (normal(2, 3), normal(2))},
        # Five batches: the inner and the outer steps never see the same ones twice in a row.
        {t: [normal(6, 3) for _ in range(5)] for t in TASKS},
    )


def model_of(given: Problem) -> weft.MultiTaskModel:
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            tensor.copy_(given.start[name])
    example = torch.zeros(1, 3, dtype=torch.float64)
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=example)
    for task in TASKS:
        weight, bias = given.heads[task]
        model.add_task(task, weft.Classification(len(weight)))
        with torch.no_grad():
            for name in NAMES:
                model.tasks[task].own[name].copy_(given.tuned[task][name])
            model.head(task).linear.weight.copy_(weight)  # type: ignore[union-attr,operator]
            model.head(task).linear.bias.copy_(bias)  # type: ignore[union-attr,operator]
    return model.eval()


class Adam:
    """Kingma and Ba's, with the usual constants, for one number or tensor."""

    def __init__(self, rate: float) -> None:
        self.rate, self.count, self.first, self.second = rate, 0, 0.0, 0.0

    def moved(self, value: Tensor, gradient: Tensor) -> Tensor:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean = self.first / (1 - 0.9**self.count)
        square = self.second / (1 - 0.999**self.count)
        return value - self.rate * mean / (square**0.5 + 1e-8)


Scales = list[list[Tensor]]
"""By task and tensor."""


class Reference:
    """The course of the specification, section 2."""

    def __init__(self, given: Problem, seed: int, temperature: float) -> None:
        self.given, self.temperature = given, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, Iterator[Tensor]] = {
            t: itertools.cycle(given.inputs[t]) for t in TASKS
        }

    def merged(self, scales: Scales, mask: dict[str, Tensor] | None) -> dict[str, Tensor]:
        found = {}
        for k, name in enumerate(NAMES):
            tensor = self.given.start[name]
            for i, task in enumerate(TASKS):
                vector = self.given.tuned[task][name] - self.given.start[name]
                if mask is not None:
                    m = mask[name]
                    vector = vector * m / (m.sum() / m.numel())
                tensor = tensor + scales[i][k] * vector
            found[name] = tensor
        return found

    def entropy(self, tensors: dict[str, Tensor]) -> Tensor:
        """Of all tasks, each on its next batch."""
        whole = torch.zeros((), dtype=torch.float64)
        for task in TASKS:
            x = next(self.inputs[task])
            weight, bias = self.given.heads[task]
            for row in x:
                hidden = torch.tanh(tensors["0.weight"] @ row + tensors["0.bias"])
                powers = torch.exp(weight @ (tensors["2.weight"] @ hidden) + bias)
                shares = powers / powers.sum()
                whole = whole - (shares * torch.log(shares)).sum() / len(x)
        return whole

    def drawn(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name in NAMES:
            u = torch.rand(SHAPES[name], generator=self.generator, dtype=torch.float64)
            power = (torch.log(u) - torch.log(1 - u) + logits[name]) / self.temperature
            found[name] = 1 / (1 + torch.exp(-power))
        return found

    def learned(
        self,
        form: str,
        scale: float,
        mask: dict[str, Tensor] | None,
        rate: float,
        steps: int,
        clamp: bool,
    ) -> Scales:
        """Scales after Adam steps: one for a task, or one for each of its tensors."""
        each = len(NAMES) if form == "layer_wise" else 1
        free = [torch.tensor(scale, dtype=torch.float64) for _ in range(len(TASKS) * each)]
        adams = [Adam(rate) for _ in free]

        def spread(values: Sequence[Tensor]) -> Scales:
            rows = [list(values[i * each : (i + 1) * each]) for i in range(len(TASKS))]
            return [row * (len(NAMES) // each) for row in rows]

        for _ in range(steps):
            values = [value.clone().requires_grad_() for value in free]
            loss = self.entropy(self.merged(spread(values), mask))
            gradients = torch.autograd.grad(loss, values)
            free = [
                adam.moved(value, gradient)
                for adam, value, gradient in zip(adams, free, gradients, strict=True)
            ]
            if clamp:
                free = [value.clamp(0.0, 1.0) for value in free]
        return spread(free)


def reference(given: Problem, options: dict[str, Any]) -> dict[str, Tensor]:
    """The merged tensors."""
    form, scale, clamp = options["form"], options["scale"], options["clamp"]
    course = Reference(given, options["seed"], options["temperature"])
    plain = [[torch.tensor(scale, dtype=torch.float64) for _ in NAMES] for _ in TASKS]
    course.entropy(given.start)  # weft looks at one batch before it starts
    logits = {n: torch.zeros(SHAPES[n], dtype=torch.float64) for n in NAMES}
    adams = {n: Adam(options["lr"]) for n in NAMES}
    for _ in range(options["steps"] if options["masked"] else 0):
        for x in logits.values():
            x.requires_grad_()
        mask = course.drawn(logits)
        scales = plain
        if form != "task_arithmetic":
            fixed = {n: m.detach() for n, m in mask.items()}
            scales = course.learned(form, scale, fixed, options["inner_lr"], 1, clamp)
        loss = course.entropy(course.merged(scales, mask))
        gradients = torch.autograd.grad(loss, list(logits.values()))
        logits = {
            n: adams[n].moved(logits[n].detach(), gradient)
            for n, gradient in zip(NAMES, gradients, strict=True)
        }
    final = None
    if options["masked"]:
        final = course.drawn(logits)
        if options["hard"]:
            final = {n: torch.where(m > 0.5, 1.0, 0.0).double() for n, m in final.items()}
    scales = plain
    if form != "task_arithmetic":
        scales = course.learned(
            form, scale, final, options["scale_lr"], options["scale_steps"], clamp
        )
    return course.merged(scales, final)


OPTIONS: dict[str, Any] = {
    "form": "layer_wise", "masked": True, "scale": 0.35, "temperature": 0.7, "steps": 4, "lr": 0.05,
    "inner_lr": 0.2, "scale_steps": 3, "scale_lr": 0.03, "clamp": True, "hard": False, "seed": 11,
}  # fmt: skip


@pytest.mark.parametrize("form", ["task_arithmetic", "task_wise", "layer_wise"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"hard": True},
        {"masked": False},
        {"temperature": 0.3},
        {"inner_lr": 1.0},  # the paper's: what the inner step moves ends at 0 or 1
        {"inner_lr": 1.0, "clamp": False},
    ],
    ids=str,
)
def test_it_is_the_reference(form: str, changed: dict[str, Any]) -> None:
    options = {**OPTIONS, "form": form, **changed}
    given = problem()
    found = concrete(model_of(given), given.inputs, progress=False, **options)
    expected = reference(given, options)
    for name, tensor in found.base.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[name].detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"hard": True}),
        ({}, {"masked": False}),
        ({}, {"temperature": 0.3}),
        ({}, {"inner_lr": 0.1}),
        ({}, {"form": "task_wise"}),
        ({"form": "task_wise"}, {"form": "task_arithmetic"}),
        ({"inner_lr": 1.0}, {"inner_lr": 1.0, "clamp": False}),
    ],
)
def test_the_reference_depends_on_every_option(one: dict[str, Any], other: dict[str, Any]) -> None:
    given = problem()
    found = [reference(given, {**OPTIONS, **change}) for change in (one, other)]
    assert any(bool((found[0][n] - found[1][n]).abs().max() > 1e-5) for n in NAMES)
