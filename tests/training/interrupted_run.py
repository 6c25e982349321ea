"""A run with everything that a checkpoint has to hold, as a script that is killed or as a function.

``python interrupted_run.py FOLDER WHEN`` trains into a folder until it is killed: "reading", in the
middle of an epoch, or "writing", with a checkpoint half written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_nets import conv_net, images

import weft

EPOCHS = 8


class Watched(TensorDataset):
    """Data that adds noise, as augmentation does, and tells when it is read."""

    def __init__(self, data: TensorDataset, reading: Callable[[], None]) -> None:
        super().__init__(*data.tensors)
        self.reading = reading

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reading()
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


def make_model() -> weft.MultiTaskModel:
    """Two TAPS tasks with dropout in the base and heads that are built by fit."""
    base = nn.Sequential(conv_net(), nn.Dropout(0.2))
    plan = weft.taps(base, warmup=2, harden=0.3, penalty=0.1)
    model = weft.MultiTaskModel(base, plan)
    for task in "ab":
        model.add_task(task, weft.Classification(3))
    return model


def train(
    model: weft.MultiTaskModel, reading: Callable[[], None] = lambda: None, **options: Any
) -> weft.History:
    """Fit both tasks."""

    def loader(task: int, *, train: bool) -> DataLoader[tuple[Tensor, ...]]:
        data = images(26 if train else 16, 3, task + 10 * train)
        watched = Watched(data, reading) if train else data
        own = torch.Generator() if task == 1 else None
        return DataLoader(watched, 8, shuffle=True, drop_last=train, generator=own)

    data = {
        name: (loader(index, train=True), loader(index, train=False))
        for index, name in enumerate("ab")
    }
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "lr": 0.01,
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "accumulate": 2,
        "clip": 1.0,
        "warmup_steps": 3,
        "patience": 50,
        "seed": 7,
        "progress": False,
    }
    return weft.fit(model, data, **{**settings, **options})


def die() -> None:
    """End this process at once, as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, action: Callable[[], None]) -> Callable[[], None]:
    """A function whose ``count``-th call acts."""
    calls = [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] == count:
            action()

    return call


def main(folder: str, when: str) -> None:
    torch.set_num_threads(1)
    # An epoch reads 2 tasks of 24 samples; building the heads reads a batch of 8 of each.
    reading = after(16 + 5 * 48 + 20, die) if when == "reading" else lambda: None
    if when == "writing":
        replace, dies = os.replace, after(4, die)

        def replace_or_die(source: Path, target: Path) -> None:
            dies()
            replace(source, target)

        os.replace = replace_or_die  # type: ignore[assignment]
    train(make_model(), reading, checkpoint=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
