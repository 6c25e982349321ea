"""Merging fine-tuned networks: concrete masks against their unmasked counterparts, tuned task
arithmetic, TIES and averages.

Each domain of PACS is fine-tuned alone from the ImageNet base, with its own head. Scales and
densities are chosen on validation; unlabelled images are those of validation; test is reported.
``--smoke`` runs a few steps into a folder of its own, to see that everything works.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import torch
import yaml
from patches import HERE, Config, loaders, make_base

import weft
from weft.data import Preprocessing, load, loader
from weft.merging import Merged, concrete, merge


def fine_tuned(config: Config, data: Path, read: dict[str, Any]) -> weft.MultiTaskModel:
    """A model that owns everything for every domain."""
    base = make_base(data)
    example = torch.zeros(1, 3, 96, 96)
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=example)
    for task, (classes, batches) in read.items():
        model.add_task(task, weft.Classification(classes, head_init="zero"))
        weft.fit(
            model, {task: (batches["train"], batches["val"])}, epochs=config["epochs"],
            steps=config.get("steps"), lr=config["lr"], head_lr=config["head_lr"], keep="last",
            seed=config["seed"], progress=False,
        )  # fmt: skip
    return model.eval()


def unlabelled(config: Config, data: Path, task: str) -> Any:
    """Shuffled validation images in small batches."""
    sets = load(f"npz:{data / (task + '.npz')}")
    size = config["unlabelled"]["batch_size"]
    return loader(sets.val, size, train=True, preprocessing=Preprocessing.symmetric())


def ways(
    config: Config, model: weft.MultiTaskModel, val: Config, images: Config, rate: str
) -> dict[str, Callable[[], Merged]]:
    """Every way to merge, those without labels at one of the rates."""
    stated = {k: v for k, v in config["unlabelled"].items() if k != "batch_size"}
    stated |= config["rates"][rate]
    blind = partial(concrete, model, images, seed=config["seed"], progress=False, **stated)
    arithmetic = {
        "task arithmetic, 0.3": partial(merge, model, scale=0.3),
        "concrete task arithmetic": partial(blind, form="task_arithmetic"),
        "concrete task arithmetic, diversity": partial(
            blind, form="task_arithmetic", diversity=1.0
        ),
        "AdaMerging, layer-wise": partial(blind, form="layer_wise", masked=False),
    }
    if rate == "slow":
        untrained = partial(
            concrete, model, images, seed=config["seed"], steps=1, lr=1e-9, progress=False
        )
        return arithmetic | {"a mask as it is drawn, not trained": untrained}

    def best_ties() -> Merged:
        found = [
            merge(model, how="ties", density=d, data=val, scales=config["scales"])
            for d in config["densities"]
        ]
        return max(found, key=lambda m: statistics.fmean(m.scores[m.scale].values()))

    return arithmetic | {
        "average": partial(merge, model, how="average"),
        "task arithmetic, tuned": partial(merge, model, data=val, scales=config["scales"]),
        "TIES, tuned": best_ties,
        "concrete, layer-wise": partial(blind, form="layer_wise"),
        "concrete, layer-wise, diversity": partial(blind, form="layer_wise", diversity=1.0),
    }


def scores(model: weft.MultiTaskModel, read: dict[str, Any]) -> Config:
    """Accuracy of every task on validation and test."""
    return {
        split: {
            task: weft.evaluate(model, {task: batches[split]})[task]["accuracy"]
            for task, (_, batches) in read.items()
        }
        for split in ("val", "test")
    }


def run_cell(config: Config, data: Path, seed: int, rate: str) -> Config:
    """Fine-tune with one seed, and merge in every way at one of the rates."""
    started = time.perf_counter()
    config = {**config, "seed": seed}
    torch.manual_seed(seed)
    read = {task: loaders(data, task, config["batch_size"]) for task in config["tasks"]}
    model = fine_tuned(config, data, read)
    val = {task: batches["val"] for task, (_, batches) in read.items()}
    images = {task: unlabelled(config, data, task) for task in read}
    found: Config = {"individual": scores(model, read)}
    for name, way in ways(config, model, val, images, rate).items():
        torch.manual_seed(seed)
        began = time.perf_counter()
        merged = way()
        found[name] = {
            **scores(merged.model, read),
            "scale": merged.scale,
            "warnings": list(merged.warnings),
            "seconds": time.perf_counter() - began,
        }
    return {"seed": seed, "rate": rate, "ways": found, "seconds": time.perf_counter() - started}


def show(folder: Path) -> None:
    """Print the mean over the domains of every way as a Markdown table."""
    from sharing_tables import spread

    results = [fleet.json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    print("| | rate | test, mean | validation, mean | collapsed |\n|---|---|---|---|---|")
    found: dict[tuple[str, str], list[Config]] = defaultdict(list)
    for result in results:
        for name, scored in result["ways"].items():
            found[name, result["rate"]].append(scored)
    for (name, rate), rows in found.items():
        means = {s: [100 * statistics.fmean(r[s].values()) for r in rows] for s in ("test", "val")}
        collapsed = sum(any("collapsed" in w for w in r.get("warnings", ())) for r in rows)
        print(
            f"| {name} | {rate} | {spread(means['test'])} | {spread(means['val'])} | {collapsed} |"
        )


def main() -> None:
    """Run all seeds that are not there yet, and print the table."""
    parser = fleet.arguments(__doc__, HERE / "results" / "merging")
    parser.add_argument("--smoke", action="store_true", help="a few steps, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "merging.yaml").read_text())
    out = given.out
    if given.smoke:
        config |= {"seeds": [0], "steps": 2, "epochs": 1, "batch_size": 8}
        config |= {"scales": [0.3, 1.0], "densities": [0.2]}
        config["unlabelled"] |= {"steps": 2, "scale_steps": 2}
        out = out.with_name(out.name + "-smoke")
    cells = [(seed, rate) for rate in config["rates"] for seed in config["seeds"]]
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)
    show(out)


if __name__ == "__main__":
    main()
