"""Every method of weft on real images: one cell per data set, method and seed.

The last epoch is reported, so no choice is made on test data; validation scores stand beside it.
Cells run in two processes of one thread each, which is faster on two cores than one of two.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from mobilenet import WEIGHTS_FILE, mobilenet_v2_035

import weft
from weft.data import Augmentation, Preprocessing, load, loader

HERE = Path(__file__).parent


def run_cell(config: dict[str, Any], data: Path, task: str, cell: str, seed: int) -> dict[str, Any]:
    """Train and score one cell."""
    settings = config["cells"][cell]
    epochs = config["tasks"][task]
    torch.manual_seed(seed)
    base = mobilenet_v2_035(data / "weights" / WEIGHTS_FILE).to(memory_format=torch.channels_last)
    sets = load(f"npz:{data / (task + '.npz')}")
    scale = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    crop = Augmentation(flip=True, crop_padding=8)
    batch = config["batch_size"]
    train = loader(sets.train, batch, train=True, augmentation=crop, preprocessing=scale)
    val = loader(sets.val, 256, train=False, preprocessing=scale)
    test = loader(sets.test, 256, train=False, preprocessing=scale)
    plan = weft.method(settings["method"], base, **settings.get("options", {}))
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, 96, 96))
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
        "bytes_on_disk": len(safetensors.torch.save(own)),
        "epoch_seconds": statistics.median(r["seconds"] for r in rows),
        "seconds": time.perf_counter() - started,
        **{k: v for k, v in ledger.to_dict().items() if k != "task"},
        "machine": platform.machine(),
        "torch": torch.__version__,
        "weft": weft.__version__,
    }


def worker(
    config: dict[str, Any], data: Path, out: Path, cells: list[tuple[str, str, int]]
) -> None:
    """Run the cells that no process has taken yet."""
    torch.set_num_threads(1)
    if platform.system() == "Linux":
        # Keep freed memory: glibc otherwise returns it to the system after every step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 2**31 - 1)
    for task, cell, seed in cells:
        path = out / f"{task}-{cell}-{seed}.json"
        claim = path.with_suffix(".taken")
        if path.exists():
            continue
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            result = run_cell(config, data, task, cell, seed)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, indent=1))
            os.replace(temporary, path)
            share = 100 * result["own_fraction"]
            accuracy = 100 * result["test"]["accuracy"]
            print(f"{path.stem}: test {accuracy:.1f} %, own {share:.1f} %", flush=True)
        finally:
            claim.unlink(missing_ok=True)


def main() -> None:
    """Run all cells that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("WEFT_DATA"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vision")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("say where the data is: --data DIR or WEFT_DATA")
    config = yaml.safe_load((HERE / "vision.yaml").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stale in arguments.out.glob("*.taken"):
        stale.unlink()
    cells = [
        (task, cell, seed)
        for cell in config["cells"]
        for seed in config["seeds"]
        for task in config["tasks"]
    ]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(config, arguments.data, arguments.out, cells))
        for _ in range(arguments.jobs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
