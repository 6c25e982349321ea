"""Every method of weft on real images: one cell per data set, method and seed.

The last epoch is reported, so no choice is made on test data; validation scores stand beside it.
``vision.yaml`` compares methods, ``budgets.yaml`` asks TAPS for four sizes, ``rcm.yaml`` compares
RCM with single tasks and linear probes. ``responses`` of a cell is how many batches of 64 training
images the plan sees.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fleet
import safetensors.torch
import torch
import yaml
from cifar_resnet import WEIGHTS_FILE as CIFAR_WEIGHTS
from cifar_resnet import cifar_resnet20
from mobilenet import WEIGHTS_FILE, mobilenet_v2_035
from torch import nn

import weft
from weft.data import Augmentation, Loader, Preprocessing, TaskData, load, loader

HERE = Path(__file__).parent


def make_base(name: str, data: Path) -> tuple[nn.Module, Preprocessing, int]:
    """A pretrained trunk, how its pixels are scaled, and the side of its images."""
    weights = data / "weights"
    if name == "mobilenet_v2_035":
        base = mobilenet_v2_035(weights / WEIGHTS_FILE).to(memory_format=torch.channels_last)
        return base, Preprocessing.symmetric(), 96
    base = cifar_resnet20(weights / CIFAR_WEIGHTS).to(memory_format=torch.channels_last)
    return base, Preprocessing.imagenet(), 32


def make_loaders(
    task: str, sets: TaskData, scale: Preprocessing, side: int, batch: int
) -> tuple[Loader, Loader, Loader]:
    """Training, validation and test batches."""
    # Traffic signs that point left are other signs than those that point right.
    crop = Augmentation(flip=task != "gtsrb", crop_padding=side // 12)
    train = loader(sets.train, batch, train=True, augmentation=crop, preprocessing=scale)
    val = loader(sets.val, 256, train=False, preprocessing=scale)
    test = loader(sets.test, 256, train=False, preprocessing=scale)
    return train, val, test


def run_cell(config: dict[str, Any], data: Path, task: str, cell: str, seed: int) -> dict[str, Any]:
    """Train and score one cell."""
    settings = config["cells"][cell]
    epochs = config["tasks"][task]
    torch.manual_seed(seed)
    base, scale, side = make_base(config["bases"].get(task, "mobilenet_v2_035"), data)
    sets = load(f"npz:{data / (task + '.npz')}", image_size=side)
    train, val, test = make_loaders(task, sets, scale, side, config["batch_size"])
    options = settings.get("options", {})
    if "responses" in settings:
        rows = loader(sets.train, 64, train=False, preprocessing=scale)
        options = {**options, "responses": [x for x, _ in islice(rows, settings["responses"])]}
    plan = weft.method(settings["method"], base, **options)
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, side, side))
    model.add_task(task, weft.Classification(sets.classes, head_init="zero"))
    head_lr = settings.get("head_lr", config["head_lr"])
    started = time.perf_counter()
    history = weft.fit(
        model,
        {task: (train, val)},
        epochs=epochs,
        lr=settings["lr"],
        head_lr=head_lr,
        keep="last",
        seed=seed,
        progress=False,
    )
    ledger = model.ledger(task)
    own = {k: t.detach().contiguous() for k, t in model.tasks[task].own.items()}
    rows = history[task]
    return {
        "task": task,
        "cell": cell,
        "seed": seed,
        "method": settings["method"],
        "options": settings.get("options", {}),
        "lr": settings["lr"],
        "epochs": epochs,
        "test": weft.evaluate(model, {task: test})[task],
        "val": rows[-1]["val"],
        "val_by_epoch": [r["val"]["accuracy"] for r in rows],
        "gates_by_epoch": [r["open_gates"] for r in rows],
        "own_by_epoch": [r["own_fraction"] for r in rows],
        "price_by_epoch": [r["price"] for r in rows if "price" in r],
        "bytes_on_disk": len(safetensors.torch.save(own)),
        "epoch_seconds": statistics.median(r["seconds"] for r in rows),
        "seconds": time.perf_counter() - started,
        **{k: v for k, v in ledger.to_dict().items() if k != "task"},
    }


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results")
    parser.add_argument("--config", type=Path, default=HERE / "vision.yaml")
    given = parser.parse_args()
    config = {"bases": {}, **yaml.safe_load(given.config.read_text())}
    cells = [
        (task, cell, seed)
        for cell in config["cells"]
        for seed in config["seeds"]
        for task in config["cells"][cell].get("tasks", config["tasks"])
    ]
    fleet.run(
        partial(run_cell, config, given.data), cells, given.out / given.config.stem, given.jobs
    )


if __name__ == "__main__":
    main()
