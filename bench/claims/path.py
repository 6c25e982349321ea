"""Budgets of TAPS along a path: the largest first, each next one from where the one before ended.

The question is whether one such training, with a third of the epochs for each further budget,
is as accurate as a training of its own for each budget (``budgets.yaml``). Run with:
python bench/claims/path.py --data DIR   (finished cells are never run again)
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from vision import HERE, make_base, make_loaders

import weft
from weft.data import load

BUDGETS = (0.4, 0.2, 0.1, 0.05)
TASKS = ("pacs_sketch", "pacs_cartoon")


@torch.no_grad()
def go_on_from(model: weft.MultiTaskModel, before: weft.MultiTaskModel, task: str) -> None:
    """Start a task from the tensors, scores and head that it ended with in another model."""
    new, old = model.tasks[task].own, before.tasks[task].own
    for key, tensor in new.items():
        if key in old:
            tensor.copy_(old[key])
    for name, score in before.tasks[task].scores.items():
        new[model.sharing.patches[name].score].fill_(score)
    model.head(task).load_state_dict(before.head(task).state_dict())


def run_cell(config: dict[str, Any], data: Path, task: str, seed: int) -> dict[str, Any]:
    """Train one task along the path and score it at each budget."""
    torch.manual_seed(seed)
    base, scale, side = make_base("mobilenet_v2_035", data)
    sets = load(f"npz:{data / (task + '.npz')}")
    train, val, test = make_loaders(task, sets, scale, side, config["batch_size"])
    lr = config["cells"]["budget_0.4"]["lr"]
    first = config["tasks"][task]
    started = time.perf_counter()
    points: dict[str, Any] = {}
    before: weft.MultiTaskModel | None = None
    for budget in BUDGETS:
        options = {} if before is None else {"warmup": 0, "harden": 0.5}
        plan = weft.taps(base, budget=budget, **options)
        model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, side, side))
        model.add_task(task, weft.Classification(sets.classes, head_init="zero"))
        if before is not None:
            go_on_from(model, before, task)
        epochs = first if before is None else max(2, round(first / 3))
        history = weft.fit(
            model,
            {task: (train, val)},
            epochs=epochs,
            lr=lr,
            head_lr=config["head_lr"],
            keep="last",
            seed=seed,
            progress=False,
        )
        points[str(budget)] = {
            "epochs": epochs,
            "own_fraction": model.ledger(task).own_fraction,
            "test": weft.evaluate(model, {task: test})[task],
            "val": history[task][-1]["val"],
        }
        before = model
    seconds = time.perf_counter() - started
    return {"task": task, "seed": seed, "lr": lr, "points": points, "seconds": seconds}


def main() -> None:
    """Run all cells that are not there yet."""
    given = fleet.arguments(__doc__, HERE / "results" / "path").parse_args()
    config = yaml.safe_load((HERE / "budgets.yaml").read_text())
    cells = [(task, seed) for seed in config["seeds"] for task in TASKS]
    fleet.run(partial(run_cell, config, given.data), cells, given.out, given.jobs)


if __name__ == "__main__":
    main()
