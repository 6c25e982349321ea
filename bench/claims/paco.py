"""How many bases do tasks need, what does a new task cost, and what does a broken task do: PaCo.

Synthetic tasks whose true parameters span three dimensions. No data is read.

- sweep: ten tasks of 12 noisy samples each, K from 1 to 10; excess error is the squared distance to
  the true function on fresh inputs, against every task by itself (least squares of minimum norm;
  for sinusoids, a network);
- new: a task of 6 samples, fitted with K numbers over the bases of the sweep, against minimum norm;
- broken: one of the tasks has targets a thousand times too large in one batch of fifty, with and
  without a limit on losses.

"linear" is y = theta x with 20 inputs; "sinusoid" is y = sum_j a_j sin(j x + b_j), three functions
of one input mixed by each task, fitted by a network with one hidden layer of 40.

Run with: python bench/claims/paco.py   (finished cells are never run again)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import torch
from torch import Tensor, nn

import weft

HERE = Path(__file__).parent
TASKS, TRUE, SAMPLES, NEW, NOISE = 10, 3, 12, 6, 0.5
KS = (1, 2, 3, 4, 5, 8, 10)
Function = Callable[[Tensor], Tensor]
Batches = dict[str, list[tuple[Tensor, Tensor]]]


class Problem:
    """Functions of tasks in a space of three dimensions, and noisy samples of them.

    Args:
        kind: "linear" or "sinusoid".
        seed: of everything.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.random = torch.Generator().manual_seed(seed)
        count = TASKS + 1  # the last one is new
        self.mixes = self.normal(count, TRUE)
        self.space = self.normal(TRUE, 20)
        self.shift = self.normal(TRUE)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.random)

    def inputs(self, rows: int) -> Tensor:
        """Inputs, (rows, features)."""
        if self.kind == "linear":
            return self.normal(rows, 20)
        return math.pi * (2 * torch.rand(rows, 1, generator=self.random) - 1)

    def target(self, task: int, x: Tensor) -> Tensor:
        """The true function of a task, (rows, 1)."""
        if self.kind == "linear":
            return x @ (self.mixes[task] @ self.space)[:, None]
        waves = torch.sin(x * torch.arange(1, TRUE + 1) + self.shift)
        return waves @ self.mixes[task][:, None]

    def samples(self, task: int, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and noisy targets."""
        x = self.inputs(rows)
        noise = NOISE if self.kind == "linear" else 0.1
        return x, self.target(task, x) + noise * self.normal(rows, 1)

    def base(self) -> nn.Module:
        """A function that has learned nothing yet."""
        if self.kind == "linear":
            return nn.Linear(20, 1, bias=False)
        return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))


def excess(problem: Problem, task: int, function: Function) -> float:
    """The mean squared distance to the true function."""
    x = problem.inputs(2000)
    with torch.no_grad():
        return float((function(x) - problem.target(task, x)).square().mean())


def fit(model: weft.MultiTaskModel, data: Batches, steps: int, seed: int, **more: Any) -> None:
    """A run long enough to reach the end."""
    given = {"lr": 0.02, "optimizer": "adamw", "keep": "last", "seed": seed, "progress": False}
    weft.fit(model, data, epochs=max(1, steps // 50), steps=50, **{**given, **more})


def regression() -> weft.Task:
    """The base's output itself."""
    return weft.Task(None, nn.functional.mse_loss)


def mixed(base: nn.Module, k: int, seed: int, **options: Any) -> Any:
    """A model of all tasks but the new one."""
    torch.manual_seed(seed)
    model = weft.MultiTaskModel(base, weft.paco(base, k=k, seed=seed, **options))
    for task in range(TASKS):
        model.add_task(f"t{task}", regression())
    return model


def errors(problem: Problem, model: weft.MultiTaskModel) -> float:
    """The mean of the tasks' excess errors."""
    model.eval()
    tasks = range(TASKS)
    return statistics.mean(excess(problem, t, partial(model, task=f"t{t}")) for t in tasks)


def minimum_norm(problem: Problem, task: int, x: Tensor, y: Tensor) -> float:
    """The excess error of least squares of minimum norm, for a linear task; else of a network."""
    if problem.kind == "linear":
        theta = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0]
        return excess(problem, task, lambda z: (z.double() @ torch.from_numpy(theta)).float())
    torch.manual_seed(0)
    base = problem.base()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    model.add_task("alone", regression())
    fit(model, {"alone": [(x, y)]}, 1500, 0)
    return excess(problem, task, partial(model.eval(), task="alone"))


def run_cell(steps: int, kind: str, what: str, k: int, seed: int) -> dict[str, Any]:
    """One K of the sweep with its new task; or the baselines; or a broken task."""
    problem = Problem(kind, seed)
    samples = {f"t{t}": [problem.samples(t, SAMPLES)] for t in range(TASKS)}
    new = problem.samples(TASKS, NEW)
    found: dict[str, Any] = {"kind": kind, "what": what, "k": k, "seed": seed}
    torch.manual_seed(seed)
    base = problem.base()
    if what == "alone":
        alone = [minimum_norm(problem, t, *samples[f"t{t}"][0]) for t in range(TASKS)]
        return {
            **found,
            "joint": statistics.mean(alone),
            "new": minimum_norm(problem, TASKS, *new),
        }
    if what.startswith("broken"):
        batches = {t: of * 50 for t, of in samples.items()}
        x, y = samples["t9"][0]
        if what != "broken_not":
            batches["t9"][25] = (x, 1000 * y)
        model = mixed(base, k, seed, limit=1e4 if what == "broken_limit" else None)
        fit(model, batches, steps, seed)
        tasks = range(TASKS)
        by_task = [excess(problem, t, partial(model.eval(), task=f"t{t}")) for t in tasks]
        return {**found, "joint": statistics.mean(by_task[:9]), "of_the_broken": by_task[9]}
    model = mixed(base, k, seed)
    fit(model, samples, steps, seed)
    found["joint"] = errors(problem, model)
    found["train"] = statistics.mean(
        float(nn.functional.mse_loss(model(of[0][0], task=t), of[0][1]).detach())
        for t, of in samples.items()
    )
    given = weft.paco(base, k=k, bases="given")
    model.add_task("new", regression(), sharing=given)
    fit(model, {"new": [new]}, steps // 2, seed, lr=0.05)
    found["own_numbers"] = model.ledger("new").own_parameters
    found["shared_parameters"] = model.ledger("new").shared_parameters
    found["new"] = excess(problem, TASKS, partial(model.eval(), task="new"))
    return found


def table(out: Path) -> None:
    """Mean and standard deviation over seeds; medians too, since errors have long tails."""
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(out.glob("*.json")):
        cell = json.loads(file.read_text())
        cells[cell["kind"], cell["what"], cell["k"]].append(cell)
    for (kind, what, k), runs in sorted(cells.items()):
        words = []
        for name in ("train", "joint", "new", "of_the_broken"):
            values = [run[name] for run in runs if name in run]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                middle = statistics.median(values)
                words.append(
                    f"{name} {statistics.mean(values):.3g} ± {spread:.2g} (median {middle:.3g})"
                )
        print(f"{kind} {what} K={k} ({len(runs)} seeds): {'; '.join(words)}")


def main() -> None:
    """Run all cells that are not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paco")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    broken = ("broken_not", "broken_limit", "broken")
    cells = [
        (kind, what, k, seed)
        for seed in range(given.seeds)
        for kind in ("linear", "sinusoid")
        for what, k in [("alone", 0), *(("sweep", k) for k in KS), *((b, TRUE) for b in broken)]
    ]
    fleet.run(partial(run_cell, given.steps), cells, given.out, given.jobs)
    table(given.out)


if __name__ == "__main__":
    main()
