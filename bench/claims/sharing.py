"""Hard sharing on real images: private bottoms against private tops, everything, and nothing.

- domains: the four domains of PACS and flowers5, 96 px, on MobileNetV2-0.35 with ImageNet weights;
- omniglot: eight alphabets, on ResNet-20 with CIFAR-10 weights. The grey images of 28 px are padded
  by 2 black pixels at each side and repeated to three channels; they are shifted by up to 2 pixels
  in training and never mirrored.

All tasks train together, with the same number of images of each in every step. The last epoch is
reported, so no choice is made on test data; validation scores stand beside it. ``--smoke`` runs two
steps of each cell into a folder of its own, to see that everything works.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from cifar_resnet import WEIGHTS_FILE as CIFAR_WEIGHTS
from cifar_resnet import cifar_resnet20
from mobilenet import WEIGHTS_FILE, mobilenet_v2_035
from torch import nn
from torch.nn import functional as F

import weft
from weft.data import ArrayData, Augmentation, Preprocessing, TaskData, load, loader

HERE = Path(__file__).parent
DOMAINS = ("pacs_photo", "pacs_art_painting", "pacs_cartoon", "pacs_sketch", "flowers5")
ALPHABETS = 8
Config = dict[str, Any]


def make_base(name: str, data: Path) -> tuple[nn.Module, int]:
    """A pretrained trunk, and the side of its images."""
    weights = data / "weights"
    if name == "domains":
        base: nn.Module = mobilenet_v2_035(weights / WEIGHTS_FILE)
        return base.to(memory_format=torch.channels_last), 96
    base = cifar_resnet20(weights / CIFAR_WEIGHTS)
    return base.to(memory_format=torch.channels_last), 32


def read(name: str, data: Path) -> dict[str, TaskData]:
    """By task, its splits."""
    if name == "domains":
        return {task: load(f"npz:{data / (task + '.npz')}") for task in DOMAINS}
    file = data / "omniglot.npz"
    return {
        f"alphabet_{i}": load(f"npz:{file}#where=task:{i}&classes=none") for i in range(ALPHABETS)
    }


def new_task(sets: TaskData) -> weft.Task:
    """The classes of a task.

    A function of its own, because cloudpickle takes ``sets.classes`` in one that uses torch for
    torch.classes, which cannot be sent to a process.
    """
    count = int(sets.train.targets.max()) + 1
    return weft.Classification(sets.classes or count, head_init="zero")


def cut(split: Any, rows: int | None, *, padded: bool) -> ArrayData:
    """The first rows of a split, or all; padded if asked for."""
    images = F.pad(split.inputs, (2, 2, 2, 2)) if padded else split.inputs
    return ArrayData(images, split.targets, split.rows[:rows])


def loaders(name: str, sets: TaskData, batch: int, rows: int | None) -> dict[str, Any]:
    """The splits of a task as batches."""
    domains = name == "domains"
    scale = Preprocessing.symmetric() if domains else Preprocessing.imagenet()
    change = Augmentation(flip=domains, crop_padding=8 if domains else 2)
    parts = {s: cut(split, rows, padded=not domains) for s, split in sets.splits.items()}
    return {
        "train": loader(
            parts["train"], batch, train=True, augmentation=change, preprocessing=scale
        ),
        "val": loader(parts["val"], 128, train=False, preprocessing=scale),
        "test": loader(parts["test"], 128, train=False, preprocessing=scale),
    }


def sgd(shared: float, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD with momentum, with a factor on the learning rate of shared tensors."""
    factors = {"shared": shared}
    scaled = [{**g, "lr": g["lr"] * factors.get(g["name"], 1.0)} for g in groups]
    return torch.optim.SGD(scaled, momentum=0.9)


def owned_convolutions(model: weft.MultiTaskModel, task: str) -> float:
    """The share of the weights of convolutions that a task owns."""
    sizes = {name: p.numel() for name, p in model.base.named_parameters() if p.dim() > 1}
    owned = sum(sizes[name] for name in model.plan(task).patches if name in sizes)
    return owned / sum(sizes.values())


def run_cell(config: Config, data: Path, run: str, cell: str, seed: int) -> Config:
    """Train and score one cell."""
    started = time.perf_counter()
    settings = config["runs"][run]
    name = settings["data"]
    plan = config["plans"][name][cell]
    torch.manual_seed(seed)
    base, side = make_base(name, data)
    example = torch.zeros(1, 3, side, side)
    sharing = weft.method(plan["method"], base, **plan.get("options", {}))
    model = weft.MultiTaskModel(base, sharing, example=example)
    batches = {}
    for task, sets in read(name, data).items():
        model.add_task(task, new_task(sets))
        batches[task] = loaders(name, sets, settings["batch_size"], config.get("rows"))
    tasks = model.task_names
    history = weft.fit(
        model,
        {task: (b["train"], b["val"]) for task, b in batches.items()},
        epochs=settings["epochs"],
        steps=settings["steps"],
        lr=config["lr"],
        head_lr=config["head_lr"],
        optimizer=partial(sgd, 1.0 / len(tasks) if plan.get("mean") else 1.0),
        one_at_a_time=True,
        keep="last",
        seed=seed,
        progress=False,
    )
    cost = weft.multiply_adds(model, example)
    scored = {
        task: {
            "test": weft.evaluate(model, {task: batches[task]["test"]})[task],
            "val": history[task][-1]["val"],
            "val_by_epoch": [row["val"]["accuracy"] for row in history[task]],
        }
        for task in tasks
    }
    ledger = model.ledger(tasks[0])
    return {
        "run": run,
        "cell": cell,
        "seed": seed,
        "settings": {k: v for k, v in settings.items() if k != "cells"},
        "plan": plan,
        "lr": config["lr"],
        "tasks": scored,
        "mean_test": statistics.mean(s["test"]["accuracy"] for s in scored.values()),
        "mean_val": statistics.mean(s["val"]["accuracy"] for s in scored.values()),
        "own_fraction": ledger.own_fraction,
        "own_convolutions": owned_convolutions(model, tasks[0]),
        "multiply_adds": {
            "common": cost.common,
            "own": dict(cost.own),
            "one_task": cost.of(tasks[0]),
            "all_tasks": cost.all_tasks,
        },
        "fit_seconds": sum(row["seconds"] for row in history[tasks[0]]),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "sharing")
    parser.add_argument("--run", action="append", help="only this run; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="two steps of each cell, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "sharing.yaml").read_text())
    out = given.out
    if given.smoke:
        few = {"batch_size": 4, "epochs": 1, "steps": 2}
        config["runs"] = {run: {**settings, **few} for run, settings in config["runs"].items()}
        config |= {"seeds": [0], "rows": 16}
        out = out.with_name(out.name + "-smoke")
    cells = [
        (run, cell, seed)
        for seed in config["seeds"]
        for run in given.run or config["runs"]
        for cell in config["runs"][run]["cells"]
    ]
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)


if __name__ == "__main__":
    main()
