"""How sparse can one network for several tasks be: DiSparse against pruning that knows no tasks.

All networks train from scratch and start, for a seed, from the same weights; "magnitude" and
"saliency" prune the same network to the same sparsity, heads included, by one ranking for all
tasks; "growth" is "dynamic" with weights grown by the sum of the tasks' losses. The last epoch is
reported, so no choice is made on test data. ``--smoke`` runs two steps of four epochs of each cell
into a folder of its own; ``--table`` prints what is there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from dense_and_census import PROBLEMS
from sharing_tables import spread
from torch import nn

import weft
from weft.core.sharing import Taken
from weft.core.sites import layer_weights
from weft.methods.growth import DropAndGrow, largest
from weft.methods.sparsity import all_weights, apart, buffer_of, overlap, set_mask, zeros

HERE = Path(__file__).parent
OWN = ("own", "head")
LEFT = "counted_without_zeros"
Config = dict[str, Any]


@dataclass(frozen=True)
class PruneTogether:
    """The baselines: one ranking of all weights, shared ones and heads, for all tasks together."""

    sparsity: float
    saliency: bool
    factors: Mapping[str, float]

    def __call__(self, model: weft.MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:
        names = layer_weights(model.base)
        weights = all_weights(model, names)
        scores = {place: w.detach().abs() for place, w in weights.items()}
        if self.saliency:
            probe = apart(model, names)
            places = all_weights(probe, names)
            sums = {place: torch.zeros_like(s) for place, s in scores.items()}
            for found in zip(*data.values(), strict=False):
                batches = dict(zip(data, found, strict=True))
                loss = joint_loss(probe, batches, self.factors)
                gradients = torch.autograd.grad(loss, list(places.values()))
                for place, gradient in zip(places, gradients, strict=True):
                    sums[place] += gradient.abs()
            scores = {place: s * sums[place] for place, s in scores.items()}
        flat = torch.cat([s.reshape(-1) for s in scores.values()])
        keep = largest(flat, round((1 - self.sparsity) * len(flat)))
        parts = keep.split([s.numel() for s in scores.values()])
        for (place, weight), part in zip(weights.items(), parts, strict=True):
            set_mask(model, place[0], place[1], weight, part.view_as(weight))


@dataclass(frozen=True)
class GrowTogether:
    """The dynamic baseline, RigL: drops as "dynamic" does, grows by the gradient of the joint loss.

    Shared weights grow as many as they dropped, not up to as many for each task.
    """

    apart: DropAndGrow
    factors: Mapping[str, float]

    def __call__(self, model: weft.MultiTaskModel, taken: Taken) -> tuple[torch.Tensor, ...]:
        missing = self.apart.let_go(model, taken.done)
        probe = apart(model, self.apart.names)
        places = all_weights(probe, self.apart.names)
        loss = joint_loss(probe, taken.batches, self.factors)
        gradients = torch.autograd.grad(loss, list(places.values()))
        for place, gradient in zip(places, gradients, strict=True):
            keep = buffer_of(model, *place)
            keep.logical_or_(largest(gradient.abs(), missing[place], among=~keep))
        return ()


def joint_loss(
    model: weft.MultiTaskModel, batches: Mapping[str, Any], factors: Mapping[str, float]
) -> torch.Tensor:
    """The weighted sum of the tasks' losses on one step."""
    outputs = model.step({task: x for task, (x, _) in batches.items()}).outputs
    losses = [
        factors.get(task, 1.0) * model.tasks[task].task.loss(outputs[task], y)
        for task, (_, y) in batches.items()
    ]
    return torch.stack(losses).sum()


def make_plan(base: nn.Module, method: str, sparsity: float, seed: int, weights: Any) -> Any:
    """The plan of a cell."""
    if method == "dense":
        return weft.disparse(base, sparsity=0.0)
    if method == "magnitude":
        plan = weft.disparse(base, sparsity=sparsity, variant="pretrained")
        first, last = plan.phases
        prepare = PruneTogether(sparsity, False, weights)
        return replace(plan, phases=(first, replace(last, prepare=prepare)))
    if method == "growth":
        plan = weft.disparse(base, sparsity=sparsity, variant="dynamic", seed=seed)
        first, last = plan.phases
        review = GrowTogether(first.review, weights)
        return replace(plan, phases=(replace(first, review=review), last))
    if method == "saliency":
        plan = weft.disparse(base, sparsity=sparsity)
        prepare = PruneTogether(sparsity, True, weights)
        return replace(plan, phases=(replace(plan.phases[0], prepare=prepare),))
    if method == "taylor":
        return weft.disparse(base, sparsity=sparsity, variant="pretrained", score="taylor")
    return weft.disparse(base, sparsity=sparsity, variant=method, seed=seed)


def run_cell(
    config: Config, data: Path, name: str, method: str, sparsity: float, seed: int
) -> Config:
    """Train and score one cell, and store it."""
    started = time.perf_counter()
    about = config["data"][name]
    problem = PROBLEMS[name](data)
    batches = problem.loaders(about["batch_size"], config.get("rows"))
    example = problem.first("train", 2)
    torch.manual_seed(seed)
    base = problem.base()
    plan = make_plan(base, method, sparsity, seed, about["weights"])
    model = weft.MultiTaskModel(base, plan, example=example)
    torch.manual_seed(seed)  # heads start alike
    for task, description in problem.tasks.items():
        model.add_task(task, description)
    history = weft.fit(
        model,
        (batches["train"], batches["val"]),
        epochs=about["epochs"],
        steps=config.get("steps"),
        lr=config["lr"],
        optimizer="adamw",
        weight_decay=config["weight_decay"],
        weights=about["weights"],
        keep="last",
        seed=seed,
        progress=False,
    )
    test = weft.evaluate(model, batches["test"])
    full = weft.multiply_adds(model.eval(), example)
    left = weft.multiply_adds(model, example, skip_zeros=True)
    with tempfile.TemporaryDirectory() as folder:
        bank = weft.Bank(folder)
        bank.save(model)
        stored = {task: vars(bank.ledger(task).stored) for task in model.task_names}
    shared = {n: model.base.get_parameter(n) for n in plan.masked}
    return {
        "data": name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "zeros": zeros(model),
        "zeros_by_layer": {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in shared.items()},
        "overlap": overlap(model),
        "test": test,
        "val": {task: history[task][-1]["val"] for task in model.task_names},
        "stored_bytes": stored,
        "multiply_adds": {task: full.of(task) for task in model.task_names},
        "counted_without_zeros": {task: left.of(task) for task in model.task_names},
        "seconds": time.perf_counter() - started,
    }


def table(config: Config, out: Path) -> None:
    """Means and standard deviations over seeds as Markdown, and Delta_T against the dense network.

    Delta_T is the mean over tasks of the mean relative change of their metrics, in %; better is
    positive.
    """
    cells: dict[tuple[str, str, float], list[Config]] = defaultdict(list)
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text())
        cells[found["data"], found["method"], found["sparsity"]].append(found)
    for name, about in config["data"].items():
        metrics = about["reference"]
        titles = [f"{task}, {metric}" for task, chosen in metrics.items() for metric in chosen]
        titles = ["zeros", "Delta_T", *titles, "on disk", "multiply-adds left"]
        print(f"\n| {name} | {' | '.join(titles)} |\n|{'---|' * (1 + len(titles))}")
        dense = {run["seed"]: run for run in cells.get((name, "dense", 0.0), ())}
        mine = sorted((zeros, m) for data, m, zeros in cells if data == name)
        for sparsity, method in mine:
            runs = cells[name, method, sparsity]
            deltas = [delta(run["test"], dense[run["seed"]]["test"], metrics) for run in runs]
            scores = [
                spread([100 * run["test"][task][metric] for run in runs], 2)
                for task, chosen in metrics.items()
                for metric in chosen
            ]
            stored = sum(sum(s[k] for s in runs[0]["stored_bytes"].values()) for k in OWN)
            stored += next(iter(runs[0]["stored_bytes"].values()))["shared"]
            left = statistics.mean(map(statistics.mean, (r[LEFT].values() for r in runs)))
            full = statistics.mean(runs[0]["multiply_adds"].values())
            cost = [f"{stored / 1e3:.0f} kB", f"{100 * left / full:.0f} %"]
            parts = [f"{sparsity:.0%}", spread(deltas, 2), *scores, *cost]
            print(f"| {method} | {' | '.join(parts)} |")


def delta(new: Config, old: Config, metrics: Mapping[str, list[str]]) -> float:
    """How much better a network is than another, in %."""
    changes = []
    for task, chosen in metrics.items():
        signs = [-1 if metric == "mae" else 1 for metric in chosen]
        changes.append(
            statistics.mean(
                100 * sign * (new[task][metric] - old[task][metric]) / old[task][metric]
                for sign, metric in zip(signs, chosen, strict=True)
            )
        )
    return statistics.mean(changes)


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "disparse")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each cell, one seed")
    parser.add_argument("--table", action="store_true", help="print the results that there are")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "disparse.yaml").read_text())
    out = given.out
    if given.smoke:
        few = {"epochs": 4, "batch_size": 8}
        config["data"] = {name: {**about, **few} for name, about in config["data"].items()}
        config |= {"seeds": [0], "steps": 2, "rows": 48, "sparsities": [0.9]}
        out = out.with_name(out.name + "-smoke")
    cells = [
        (name, method, sparsity, seed)
        for name, about in config["data"].items()
        for sparsity in (0.0, *config["sparsities"])
        for seed in config["seeds"]
        for method in (about["methods"] if sparsity else ["dense"])
    ]
    if not given.table:
        fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)
    table(config, out)


if __name__ == "__main__":
    main()
