"""One cell, from its configuration to its bank and its result."""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.assembly import (
    first_rows,
    load_experiment_base,
    make_loaders,
    make_model,
    read_data,
    resolved,
)
from weft.bank import Bank
from weft.bank.shared import shared_tensors
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.data import Loader
from weft.training import History, evaluate, fit
from weft.training.batches import to_device
from weft.training.evaluation import choosing_scores, device_of, modes_kept
from weft.training.history import Epoch

from .cells import CORRECT, FAILURE, LOG, RESULT, Cell, versions
from .files import put, put_json
from .measuring import (
    bytes_on_disk,
    latency,
    peak_device_memory,
    peak_memory,
    reset_peak_memory,
)
from .pretrained import over_the_base, seconds_before, trained_first

OnEpoch = Callable[[int], None]
"""Called with the number of epochs that are done."""


def run_cell(cell: Cell, on_epoch: OnEpoch) -> None:
    """Train a cell's tasks, score them, keep them in the cell's bank, and write the result.

    A cell that was interrupted goes on from its checkpoint to the same result.

    Args:
        cell: the cell.
        on_epoch: called after each epoch.
    """
    began = time.perf_counter()
    experiment, folder = cell.experiment, cell.folder
    base, stated = load_experiment_base(experiment)
    sets = read_data(experiment)
    loaders = {name: make_loaders(experiment, name, data, stated) for name, data in sets.items()}
    drawn, example = experiment.model_copy(update={"seed": cell.seed}), first_rows(loaders)
    start = base
    if cell.pretrained:
        start = trained_first(cell, base, sets, loaders, example, on_epoch)
    model = make_model(drawn, start, sets, example)
    reset_peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    history = _fit(cell, model, loaders, on_epoch)
    if cell.pretrained:
        model = over_the_base(model, base)
    device = device_of(model)
    memory = {
        "peak_memory_bytes": peak_memory(),
        "device_memory_bytes": peak_device_memory(device),
    }
    for name in cell.tasks:
        facts = model.tasks[name].facts
        if "test" in loaders[name]:
            facts["metrics"]["test"] = evaluate(model, {name: loaders[name]["test"]})[name]
        facts["experiment"] = resolved(experiment, name)
        facts["seed"] = cell.seed
    bank = Bank(folder.bank)
    bank.save(model)
    right = _correct(cell, model, loaders)
    if right:
        put(cell.file(CORRECT), save(right))
    about = {**_about(cell, model, device), **memory}
    model.eval()
    rows = [
        {**about, **_row(cell, model, history, bank, name, loaders[name])} for name in cell.tasks
    ]
    wall = round(time.perf_counter() - began, 3)
    put_json(cell.file(RESULT), {"cell": cell.name, "wall_seconds": wall, "rows": rows})
    clear(cell)


def _fit(
    cell: Cell,
    model: MultiTaskModel,
    loaders: Mapping[str, Mapping[str, Loader]],
    on_epoch: OnEpoch,
) -> History:
    """Train the tasks, together or in turn."""
    settings, folder = cell.experiment.train.model_dump(exclude={"joint"}), cell.folder
    together, log = History(), folder.history("cell")
    for place, names in enumerate(cell.turns):
        before = cell.epochs - (len(cell.turns) - place) * cell.experiment.train.epochs
        history = fit(
            model,
            {name: (loaders[name]["train"], loaders[name].get("val")) for name in names},
            **settings,
            seed=cell.seed,
            checkpoint=folder.checkpoint("cell" if len(cell.turns) == 1 else f"cell{place}"),
            log=log if len(cell.turns) == 1 else None,
            callbacks=(partial(_tell, before, on_epoch),),
            progress=False,
        )
        together.rows |= history.rows
        together.best |= history.best
    together.write(log)
    return together


@torch.no_grad()
def _correct(
    cell: Cell, model: MultiTaskModel, loaders: Mapping[str, Mapping[str, Loader]]
) -> dict[str, Tensor]:
    """By task that is a classification, which rows of validation are right."""
    device, found = device_of(model), {}
    with modes_kept(model):
        model.eval()
        for name, section in cell.experiment.tasks.items():
            if section.kind == "classification" and "val" in loaders[name]:
                parts = [
                    model(to_device(x, device), task=name).argmax(1).cpu() == y.cpu()
                    for x, y in loaders[name]["val"]
                ]
                found[name] = torch.cat(parts).to(torch.uint8)
    return found


def clear(cell: Cell) -> None:
    """Drop what a finished cell no longer needs."""
    shutil.rmtree(cell.folder.checkpoint("cell").parent, ignore_errors=True)
    for name in (FAILURE, LOG):
        cell.file(name).unlink(missing_ok=True)


def _tell(before: int, on_epoch: OnEpoch, epoch: Epoch) -> None:
    on_epoch(before + epoch.number + 1)


def _about(cell: Cell, model: MultiTaskModel, device: torch.device) -> dict[str, Any]:
    """What the tasks of a cell have in common."""
    section = cell.experiment.method
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "cell": cell.name,
        "label": cell.label,
        "method": section.name,
        "options": section.options,
        "train": dict(cell.changes),
        "seed": cell.seed,
        "joint": cell.joint,
        "shared_bytes": sum(t.numel() * t.element_size() for t in shared_tensors(model).values()),
        "base_bytes": sum(t.numel() * t.element_size() for _, t in named_tensors(model.base)),
        "device": processor,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.node()} {platform.machine()}",
        **versions(),
        "python": platform.python_version(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _row(
    cell: Cell,
    model: MultiTaskModel,
    history: History,
    bank: Bank,
    name: str,
    splits: Mapping[str, Loader],
) -> dict[str, Any]:
    """The scores and costs of one task."""
    metrics = model.tasks[name].facts["metrics"]
    scores = {split: _plain(metrics.get(split) or {}) for split in ("val", "test")}
    main = next(iter(model.tasks[name].task.metrics), "loss")
    rows = history[name]
    batch = _batch(splits, cell.experiment.data.batch_size)
    count = pytree.tree_leaves(batch)[0].shape[0]
    ledger = model.ledger(name).to_dict()
    return {
        **ledger,
        "metric": main,
        "higher_is_better": choosing_scores(model, {name: {main: 1.0}})[name] > 0,
        "scores": scores,
        "disk_bytes": bytes_on_disk(bank.path / "tasks" / name),
        "seconds": round(seconds_before(cell) + sum(row["seconds"] for row in rows), 3),
        "epochs": len(rows),
        "best_epoch": history.best[name],
        "phase": rows[-1]["phase"],
        "latency_ms_per_row": latency(model, name, batch, device_of(model)) / count,
        "latency_batch": count,
    }


def _batch(splits: Mapping[str, Loader], rows: int) -> Any:
    """At most so many rows of inputs, of a split that is not augmented if there is one."""
    loader = splits.get("test") or splits.get("val") or splits["train"]
    x, _ = next(iter(loader))
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:rows], x)


def _plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as JSON knows them: what is no number becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
