"""TAPS joint against sequential on the four domains of PACS, MobileNetV2-0.35, 96 px.

- efficient: one network trains on all domains, with a head for each; frozen, it is the base of TAPS
  for each domain in turn;
- full: base, residuals and scores of all domains train together.

Sequential TAPS over the ImageNet base is ``taps_1`` of vision.py, and that one network by itself is
``logits`` of patches.py, trained for all domains together. The last epoch is reported. ``--smoke``
runs six steps of each cell into a folder of its own, to see that everything works.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import fleet
import torch
import yaml
from patches import HERE, Config, loaders, make_base, scores

import weft
from weft.training import History


def training(model: weft.MultiTaskModel, data: Config, config: Config) -> History:
    """Train as all cells do."""
    return weft.fit(
        model, data, epochs=config["epochs"], steps=config.get("steps"), lr=config["lr"],
        head_lr=config["head_lr"], keep="last", seed=config["seed"], one_at_a_time=True,
        progress=False,
    )  # fmt: skip


def run_cell(config: Config, data: Path, name: str, seed: int) -> Config:
    """Train all domains in one way and score each."""
    started = time.perf_counter()
    config, cell = {**config, "seed": seed}, config["cells"][name]
    torch.manual_seed(seed)
    base, example = make_base(data), torch.zeros(1, 3, 96, 96)
    read = {task: loaders(data, task, config["batch_size"]) for task in config["tasks"]}
    batches = {task: b for task, (_, b) in read.items()}
    tasks = {t: weft.Classification(c, head_init="zero") for t, (c, _) in read.items()}
    pairs = {task: (b["train"], b["val"]) for task, b in batches.items()}
    fit = partial(training, config=config)
    if cell["kind"] == "efficient":
        plan = partial(weft.taps, penalty=cell["penalty"])
        model = weft.efficient_joint(
            base, tasks, pairs, plan=plan, pretraining=fit, training=fit, example=example
        )
    else:
        sharing = weft.taps(base, penalty=cell["penalty"], joint=True)
        model = weft.MultiTaskModel(base, sharing, example=example)
        for task, kind in tasks.items():
            model.add_task(task, kind)
        fit(model, pairs)
    found = {task: scores(model, task, b) for task, b in batches.items()}
    about = {"cell": name, "seed": seed, "settings": cell, "tasks": found}
    return {**about, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "joint")
    parser.add_argument("--smoke", action="store_true", help="six steps of each cell, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "joint.yaml").read_text())
    out = given.out
    if given.smoke:
        config |= {"seeds": [0], "epochs": 6, "steps": 1, "batch_size": 8}
        out = out.with_name(out.name + "-smoke")
    cells = [(cell, seed) for seed in config["seeds"] for cell in config["cells"]]
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)


if __name__ == "__main__":
    main()
