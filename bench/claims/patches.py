"""Model patches on real images: alone, together with the base, and in cascades over resolutions.

- alone: patches against logits only, over logits that train and over fixed random ones;
- together: a base that trains with all domains and a patch for each, against a network for each;
- cascade: a patch for each image size; thresholds are chosen on validation and reported on test.

The last epoch is reported. Cells run in processes of one thread each; ``--smoke`` runs two steps of
each into a folder of their own, to see that everything works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from mobilenet import WEIGHTS_FILE, mobilenet_v2_035
from torch import nn

import weft
from weft.cascade import Cascade, Resized, add_resolutions
from weft.data import Augmentation, Preprocessing, load, loader

HERE = Path(__file__).parent
Config = dict[str, Any]


def make_base(data: Path) -> nn.Module:
    """The pretrained trunk."""
    network = mobilenet_v2_035(data / "weights" / WEIGHTS_FILE)
    return network.to(memory_format=torch.channels_last)


def make_plan(base: nn.Module, settings: Config) -> weft.Sharing:
    """A cell's plan."""
    return weft.method(settings["method"], base, **settings.get("options", {}))


def loaders(data: Path, task: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """The splits of a data set as batches of 96 x 96 images, and its classes."""
    sets = load(f"npz:{data / (task + '.npz')}")
    scale = Preprocessing.symmetric()
    crop = Augmentation(flip=True, crop_padding=8)
    train = loader(sets.train, batch, train=True, augmentation=crop, preprocessing=scale)
    rest = {"val": sets.val, "test": sets.test}
    return sets.classes, {
        "train": train,
        **{k: loader(s, 256, train=False, preprocessing=scale) for k, s in rest.items()},
    }


def fit(model: weft.MultiTaskModel, data: Any, epochs: int, cell: Config, config: Config) -> None:
    """Train as all cells do."""
    steps = config.get("steps")
    weft.fit(
        model, data, epochs=1 if steps else epochs, steps=steps, lr=cell["lr"],
        head_lr=config["head_lr"], keep="last", seed=config["seed"], progress=False,
    )  # fmt: skip


def new_model(base: nn.Module, cell: Config) -> weft.MultiTaskModel:
    """A model on the base with the cell's plan."""
    return weft.MultiTaskModel(base, make_plan(base, cell), example=torch.zeros(1, 3, 96, 96))


def scores(model: weft.MultiTaskModel, task: str, data: Any) -> Config:
    """Scores on validation and test, and what the task owns."""
    ledger = {k: v for k, v in model.ledger(task).to_dict().items() if k != "task"}
    return {s: weft.evaluate(model, {task: data[s]})[task] for s in ("val", "test")} | ledger


def alone(config: Config, data: Path, task: str, cell: Config) -> Config:
    """One task with a patch over a frozen base."""
    classes, batches = loaders(data, task, config["batch_size"])
    trains = cell.get("head_trains", True)
    init = "zero" if trains else "default"
    model = new_model(make_base(data), cell)
    model.add_task(task, weft.Classification(classes, head_init=init, head_trains=trains))
    pair = {task: (batches["train"], batches["val"])}
    fit(model, pair, config["alone"]["epochs"][task], cell, config)
    return scores(model, task, batches)


def together(config: Config, data: Path, _: str, cell: Config) -> Config:
    """All domains at once."""
    read = {t: loaders(data, t, config["batch_size"]) for t in config["together"]["tasks"]}
    model = new_model(make_base(data), cell)
    for task, (classes, _) in read.items():
        model.add_task(task, weft.Classification(classes, head_init="zero"))
    pairs = {t: (batches["train"], batches["val"]) for t, (_, batches) in read.items()}
    fit(model, pairs, config["together"]["epochs"], cell, config)
    return {"tasks": {task: scores(model, task, batches) for task, (_, batches) in read.items()}}


def cascade(config: Config, data: Path, task: str, cell: Config) -> Config:
    """A task at several sizes, and cascades over them."""
    classes, batches = loaders(data, task, config["batch_size"])
    model = new_model(make_base(data), cell)
    head = weft.Classification(classes, head_init="zero")
    stages = add_resolutions(model, task, head, config["cascade"]["sizes"])
    for name, size in stages:  # one after another: the base is frozen
        pair = {name: (Resized(batches["train"], size), Resized(batches["val"], size))}
        fit(model, pair, config["cascade"]["epochs"][task], cell, config)
    cascade = Cascade(model, stages)
    curve = cascade.curve(batches["val"])
    chosen = [
        {"tolerance": tolerance, "val": asdict(point),
         "test": cascade.at(point.threshold).evaluate(batches["test"])}
        for tolerance in config["cascade"]["tolerances"]
        for point in [curve.cheapest(tolerance)]
    ]  # fmt: skip
    alone = {
        size: scores(model, name, {s: Resized(batches[s], size) for s in ("val", "test")})
        for name, size in stages
    }
    costs = cascade.multiply_adds(next(iter(batches["val"]))[0])
    step = max(1, len(curve.points) // 100)
    points = [asdict(point) for point in (*curve.points[:-1:step], curve.points[-1])]
    return {"multiply_adds": costs, "alone": alone, "chosen": chosen, "val_curve": points}


KINDS: dict[str, Callable[[Config, Path, str, Config], Config]] = {
    "alone": alone,
    "together": together,
    "cascade": cascade,
}


def all_cells(config: Config) -> list[tuple[str, str, str, int]]:
    """Kind, data set, cell and seed."""
    return [
        (kind, task, cell, seed)
        for seed in config["seeds"]
        for kind in KINDS
        for task in (["pacs"] if kind == "together" else config[kind]["epochs"])
        for cell in config[kind]["cells"]
    ]


def run_cell(config: Config, data: Path, kind: str, task: str, cell: str, seed: int) -> Config:
    """One cell of one kind."""
    started = time.perf_counter()
    settings = config[kind]["cells"][cell]
    torch.manual_seed(seed)
    found = KINDS[kind]({**config, "seed": seed}, data, task, settings)
    about = {"kind": kind, "task": task, "cell": cell, "seed": seed, "settings": settings}
    return {**about, **found, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "patches")
    parser.add_argument("--smoke", action="store_true", help="two steps of each cell, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "patches.yaml").read_text())
    out = given.out
    if given.smoke:
        config |= {"seeds": [0], "steps": 2, "batch_size": 8}
        out = out.with_name(out.name + "-smoke")
    fleet.run(partial(run_cell, config, given.data), all_cells(config), out, given.jobs)


if __name__ == "__main__":
    main()
