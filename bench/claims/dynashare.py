"""Which blocks does each task execute: AdaShare and DynaShare on one input with several tasks.

- camvid: street scenes; the class of each pixel, the distance of each pixel to the nearest border
  between classes, and which of four classes are in the picture;
- census: three yes-or-no questions about a person.

All networks train from scratch, and all cells of a seed start from the same weights. The last epoch
is reported, so no choice is made on test data; validation scores stand beside it. ``--smoke`` runs
two steps of four epochs of each cell into a folder of its own, to see that everything works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from dense_and_census import PROBLEMS, Inputs, Problem
from torch import nn
from torch.utils.data import DataLoader

import weft

HERE = Path(__file__).parent
Config = dict[str, Any]

# ----------------------------------------------------------------------------- measurements


def new_model(
    problem: Problem, base: nn.Module, cell: Config, example: Inputs, seed: int
) -> weft.MultiTaskModel:
    """A model with all tasks by the plan of a cell."""
    options = dict(cell.get("options", {}))
    if cell["method"] in ("adashare", "dynashare"):
        options |= {"example": example, "seed": seed}
    model = weft.MultiTaskModel(base, weft.method(cell["method"], base, **options), example=example)
    torch.manual_seed(seed)  # heads start alike, whatever the plan has drawn
    for name, task in problem.tasks.items():
        model.add_task(name, task)
    return model


@torch.no_grad()
def executed(model: weft.MultiTaskModel, batches: DataLoader[Any]) -> dict[str, dict[str, Config]]:
    """By task and block, whether the policy executes it, and the share of rows that run it."""
    blocks = model.sharing.options.get("blocks", {})
    rows, opened = 0, {task: dict.fromkeys(blocks, 0.0) for task in model.task_names}
    chosen: dict[str, Any] = {
        task: {b: bool(model.tasks[task].own.to_dict()[f"{b}:execute"]) for b in blocks}
        for task in model.task_names
    }
    for x, _ in batches if blocks else ():
        count = len(next(iter(x.values())))
        rows += count
        inputs = dict.fromkeys(model.task_names, x)
        records = model.step(inputs, charge=dict.fromkeys(inputs, 0.0)).records
        for task, shares in opened.items():
            for block in blocks:
                record = records[task].get(block, {})
                gate = record["gate"].float().sum().item() if "gate" in record else count
                shares[block] += gate * chosen[task][block]
    return {
        task: {
            b: {"policy": chosen[task][b], "rows": shares[b] / rows, "gated": gated(model, b)}
            for b in blocks
        }
        for task, shares in opened.items()
    }


def gated(model: weft.MultiTaskModel, block: str) -> bool:
    """Whether a block has a gate that decides for each row."""
    return any(key.startswith(f"{block}:gate.") for key in model.shared.to_dict())


def mean_share(found: Mapping[str, Mapping[str, Config]], what: str) -> dict[str, float]:
    """By task, the mean over blocks; 1 where there is no policy."""
    return {
        task: statistics.mean(float(share[what]) for share in blocks.values()) if blocks else 1.0
        for task, blocks in found.items()
    }


@torch.inference_mode()
def milliseconds(
    models: Mapping[str, weft.MultiTaskModel], x: Inputs, rows: int, repeats: int
) -> dict[str, dict[str, float]]:
    """By model and task, the median time of a forward per row, the models in turn."""
    tasks = next(iter(models.values())).task_names
    times: dict[str, dict[str, list[float]]] = {m: {t: [] for t in tasks} for m in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            for task in tasks:
                started = time.perf_counter()
                model(x, task=task)
                if repeat > 1:  # the first ones warm up
                    times[name][task].append(time.perf_counter() - started)
    return {
        name: {task: 1000 * statistics.median(t) / rows for task, t in by_task.items()}
        for name, by_task in times.items()
    }


def speed(
    model: weft.MultiTaskModel, plain: weft.MultiTaskModel, problem: Problem, rows: int
) -> Config:
    """What a forward costs per row, in time and in multiply-adds, against plain sharing."""
    x = problem.first("test", rows)
    model.eval()
    plain.eval()
    times = milliseconds({"this": model, "plain": plain}, x, rows, 200 if rows == 1 else 30)
    cost, full = weft.multiply_adds(model, x), weft.multiply_adds(plain, x)
    return {
        "rows": rows,
        "milliseconds": times["this"],
        "plain_milliseconds": times["plain"],
        "multiply_adds": {task: cost.of(task) / rows for task in model.task_names},
        "plain_multiply_adds": {task: full.of(task) / rows for task in model.task_names},
    }


def run_cell(config: Config, data: Path, name: str, cell: str, seed: int) -> Config:
    """Train, score and time one cell."""
    started = time.perf_counter()
    about, settings = config["data"][name], config["cells"][cell]
    problem = PROBLEMS[name](data)
    batches = problem.loaders(about["batch_size"], config.get("rows"))
    example = problem.first("train", 2)
    torch.manual_seed(seed)
    base = problem.base()
    model = new_model(problem, base, settings, example, seed)
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
    rows = {task: history[task] for task in model.task_names}
    test = weft.evaluate(model, batches["test"])
    blocks = executed(model.eval(), batches["test"])
    plain = new_model(problem, base, config["cells"]["plain"], example, seed)
    first = next(iter(rows.values()))
    return {
        "data": name,
        "cell": cell,
        "seed": seed,
        "settings": settings,
        "epochs": about["epochs"],
        "parameters": sum(p.numel() for p in base.parameters()),
        "tasks": {
            task: {
                "test": test[task],
                "val": of_task[-1]["val"],
                "val_by_epoch": [next(iter(row["val"].values())) for row in of_task],
                "own_fraction": model.ledger(task).own_fraction,
                "executed_by_epoch": [row["executed"] for row in of_task if "executed" in row],
            }
            for task, of_task in rows.items()
        },
        "blocks": blocks,
        "executed_by_policy": mean_share(blocks, "policy"),
        "executed": mean_share(blocks, "rows"),
        "speed": [speed(model, plain, problem, count) for count in about["timing_rows"]],
        "phases": [row["phase"] for row in first],
        "fit_seconds": sum(row["seconds"] for row in first),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "dynashare")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each cell, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "dynashare.yaml").read_text())
    out = given.out
    if given.smoke:
        few = {"epochs": 4, "batch_size": 8, "timing_rows": [1, 8]}
        config["data"] = {name: {**about, **few} for name, about in config["data"].items()}
        config |= {"seeds": [0], "steps": 2, "rows": 48}
        out = out.with_name(out.name + "-smoke")
    cells = [
        (name, cell, seed)
        for seed in config["seeds"]
        for name in config["data"]
        for cell in config["cells"]
    ]
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)


if __name__ == "__main__":
    main()
