"""What two processes compute, as a script for each of them, and one process alone for comparison.

``python two_processes.py FOLDER`` under torchrun's variables writes ``FOLDER/rank.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from training_nets import conv_net, dense_net, everything, images, in_order, model_of, vectors

import weft
from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase, Sharing, Turn
from weft.training import Epoch
from weft.training.optimization import Groups

DOUBLE = torch.float64
ROWS = {"a": 48, "b": 32, "c": 16}

Plan = Callable[[nn.Module], Sharing]


def _prepare(model: MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:
    """Initialise from the data, in a random order."""
    for task, loader in data.items():
        x = torch.cat([x for x, _ in loader])
        with torch.no_grad():
            model.tasks[task].own["3.bias"].copy_(x[:8].sum(1) * 0.01)


def _phased(base: nn.Module) -> Sharing:
    phases = (
        Phase("one", freeze=("0.*",), data=(0.0, 0.5)),
        Phase("two", freeze=("1.*",), data=(0.5, 1.0), prepare=_prepare),
    )
    return replace(weft.full_finetune(base), phases=phases)


def _turns(base: nn.Module) -> Sharing:
    turns = (
        Turn("bottom", freeze=("3.*",), data=(0.0, 0.5)),
        Turn("top", train=("3.*",), heads=False, data=(0.5, 1.0)),
    )
    phases = (Phase("both", turns=turns), Phase("again", restart=True))
    return replace(weft.hard_sharing(base, own="top", fraction=0.4), phases=phases)


PLANS: dict[str, Plan] = {
    "taps": lambda base: weft.taps(base, warmup=1, harden=0.4, penalty=0.2),
    "hard_sharing": lambda base: weft.hard_sharing(base, own="top", fraction=0.4),
    "phased": _phased,
    "hard_sharing one at a time": lambda base: weft.hard_sharing(base, own="top", fraction=0.4),
    "turns": _turns,
    "disparse": lambda base: weft.disparse(base, sparsity=0.5),
    "paco": lambda base: weft.paco(base, k=2, limit=100.0),
}


class Recording(torch.optim.SGD):
    """SGD that remembers the gradients of its steps."""

    def __init__(self, groups: Groups, gradients: list[list[Tensor | None]]) -> None:
        super().__init__(groups, momentum=0.9)
        self.gradients = gradients

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found = [p.grad for g in self.param_groups for p in g["params"]]
        self.gradients.append([None if g is None else g.detach().clone() for g in found])
        super().step(closure)


def run_dense(name: str, accumulate: int) -> dict[str, Any]:
    """Several tasks on a network in which rows do not depend on each other."""
    base = dense_net().double()
    model = model_of(base, PLANS[name](base), tasks=list(ROWS))
    data = {}
    for index, (task, rows) in enumerate(ROWS.items()):
        set_ = vectors(rows, 3, index, DOUBLE)
        data[task] = (DataLoader(set_, 8, shuffle=True), in_order(vectors(16, 3, 9, DOUBLE)))
    gradients: list[list[Tensor | None]] = []
    history = weft.fit(
        model,
        data,
        epochs=4,
        lr=0.1,
        clip=1.0,
        accumulate=accumulate,
        one_at_a_time=name.endswith("one at a time"),
        weight_decay=0.01,
        warmup_steps=2,
        optimizer=lambda groups: Recording(groups, gradients),
        progress=False,
    )
    rows = {task: [{**r, "seconds": 0} for r in history[task]] for task in ROWS}
    return {"tensors": everything(model), "gradients": gradients, "rows": rows}


BATCH_NORM: dict[str, Plan] = {
    "full_finetune": weft.full_finetune,
    "taps": lambda base: weft.taps(base, warmup=0, harden=0.0),
    "hard_sharing": weft.hard_sharing,
    "hard_sharing_follow": lambda base: weft.hard_sharing(base, batchnorm="follow"),
}


def normalised_model(name: str) -> MultiTaskModel:
    """Two tasks on a network with batch normalisation, one with a normalisation in its head."""
    base = conv_net().double()
    model = model_of(base, BATCH_NORM[name](base), tasks=["a"])
    torch.manual_seed(5)
    head = nn.Sequential(nn.Flatten(), nn.Linear(216, 4), nn.BatchNorm1d(4)).double()
    model.add_task("b", weft.Task(head, nn.functional.cross_entropy))
    return model


def normalised_data() -> dict[str, TensorDataset]:
    return {"a": images(48, 3, 1, DOUBLE), "b": images(48, 4, 2, DOUBLE)}


def run_normalised(name: str, accumulate: int) -> dict[str, Any]:
    """The same by fit."""
    model = normalised_model(name)
    data = {task: DataLoader(set_, 8) for task, set_ in normalised_data().items()}
    history = weft.fit(
        model,
        data,
        epochs=2,
        lr=0.05,
        schedule="constant",
        accumulate=accumulate,
        progress=False,
    )
    return {"tensors": everything(model), "losses": [r["loss"] for r in history["b"]]}


def run_failing() -> str:
    """One process meets a loss that is not a number."""
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    before = everything(model)
    x, y = vectors(16, 3, 1).tensors
    x[5, 0] = torch.nan  # in the second half of the first batch: the second process's
    try:
        weft.fit(model, {"a": DataLoader(TensorDataset(x, y), 8)}, epochs=1, progress=False)
    except weft.WeftError as error:
        same = all(torch.equal(t, before[n]) for n, t in everything(model).items())
        return f"{same} {error}"
    return "no error"


def run_stopping() -> int:
    """One process stops; how many epochs each has run."""
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))

    def stop(epoch: Epoch) -> None:
        if os.environ["RANK"] == "1" and epoch.number == 1:
            epoch.stop()

    loader = DataLoader(vectors(16, 3, 1), 8)
    return weft.fit(model, {"a": loader}, epochs=5, callbacks=[stop], progress=False).epochs


class Noise(nn.Module):
    """Adds noise in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3.0 * torch.randn_like(x)


class Rows(Metric):
    """How many rows it has seen, added up over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, _: Tensor, target: Tensor) -> None:
        self.rows += len(target)

    def compute(self) -> Tensor:
        return self.rows


def run_drawing() -> dict[str, Any]:
    """A model that draws random numbers while it predicts."""
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(8, 3), Noise())
    metrics = {"accuracy": MulticlassAccuracy(3), "rows": Rows()}
    model.add_task("a", weft.Task(head, nn.functional.cross_entropy, metrics))
    train, val = DataLoader(vectors(32, 3, 1), 8), DataLoader(vectors(40, 3, 2), 8)
    history = weft.fit(model, {"a": (train, val)}, epochs=8, lr=1e-3, progress=False)
    values = [row["val"] for row in history["a"]]
    return {"tensors": everything(model), "best": history.best["a"], "val": values}


REVIEWED: dict[str, Plan] = {
    "grown": lambda base: weft.disparse(base, sparsity=0.5, variant="dynamic", every=2),
    "reset": lambda base: weft.paco(base, k=2, limit=1.1),  # some losses are over it
}


def run_reviewed(name: str) -> dict[str, Tensor]:
    """Changes in training by what each process sees in its own rows."""
    base = dense_net()
    model = model_of(base, REVIEWED[name](base))
    data = {t: DataLoader(vectors(32, 3, i), 8, shuffle=True) for i, t in enumerate("ab")}
    weft.fit(model, data, epochs=4, lr=0.1, progress=False)
    return everything(model)


def run_refused() -> list[str]:
    """Data that two processes cannot divide."""
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    messages = []
    for data in (DataLoader(vectors(15, 3, 1), 5), in_order(vectors(16, 3, 1))):
        try:
            weft.fit(model, {"a": data}, epochs=1, progress=False)
        except weft.WeftError as error:
            messages.append(str(error))
    return messages


def run_files(folder: Path) -> dict[str, Tensor]:
    """Interrupted in both processes, and gone on with, with files and trackers."""
    loader = DataLoader(vectors(32, 3, 1), 8, shuffle=True)

    def stop(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    for callbacks in ([stop], []):
        base = dense_net()
        model = model_of(base, weft.taps(base, warmup=1, harden=0.4))
        try:
            weft.fit(
                model,
                {"a": (loader, loader)},
                epochs=6,
                checkpoint=folder / "checkpoint",
                log=folder / "history.jsonl",
                trackers=["tensorboard"],
                callbacks=callbacks,
                progress=False,
            )
        except KeyboardInterrupt:
            continue
    return everything(model)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in PLANS:
        for accumulate in (1, 2):
            results[f"dense {name} {accumulate}"] = run_dense(name, accumulate)
    for name in BATCH_NORM:
        for accumulate in (1, 2):
            results[f"normalised {name} {accumulate}"] = run_normalised(name, accumulate)
    results["failing"] = run_failing()
    results["stopping"] = run_stopping()
    results["drawing"] = run_drawing()
    for name in REVIEWED:
        results[name] = run_reviewed(name)
    results["refused"] = run_refused()
    results["files"] = run_files(Path(folder))
    torch.save(results, Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
