"""What the tests of serving share: a small base, and banks whose tasks look trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.bank import Bank

SHAPE = (3, 6, 6)
METHODS = ("taps", "scale_bias", "full_finetune", "linear_probe")


def make_base() -> nn.Module:
    """A small convolutional base, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2)
        ).eval()


def images(rows: int = 4) -> Tensor:
    """A batch for that base."""
    return torch.randn(rows, *SHAPE)


def add_tasks(bank: Bank, *names: str, seed: int = 0, heads: bool = True) -> Any:
    """Save tasks of different methods and, if wanted, with heads of different sizes."""
    base = make_base()
    torch.manual_seed(seed)
    model = weft.MultiTaskModel(base, weft.taps(base), example=images(2))
    for i, name in enumerate(names):
        plan = weft.method(METHODS[i % len(METHODS)], base)
        classes = [f"{name} {c}" for c in range(2 + i % 3 if heads else 3)]
        model.add_task(name, weft.Classification(classes), sharing=plan)
        model.tasks[name].facts["metrics"] = {"val": {"accuracy": 0.5 + 0.01 * (i % 40)}}
    disturb(model)
    bank.save(model)
    return bank.load(base, *names).eval()


def disturb(model: weft.MultiTaskModel) -> None:
    """Move what tasks own away from its start."""
    with torch.no_grad():
        for name in model.task_names:
            for tensor in [*model.tasks[name].own.values(), *model.tasks[name].parameters()]:
                if tensor.is_floating_point() and tensor.dim():
                    tensor += 0.1 * torch.rand(tensor.shape).to(tensor)


def make_bank(folder: Path, *names: str, heads: bool = True) -> tuple[Bank, Any]:
    """A bank and the model of all its tasks, in eval mode."""
    bank = Bank(folder / "bank")
    return bank, add_tasks(bank, *(names or ("a", "b", "c", "d")), heads=heads)


def size(bank: Bank, *names: str) -> int:
    """Bytes that tasks take in memory."""
    ledgers = [bank.ledger(name) for name in names]
    return sum(led.own_bytes + led.head_bytes for led in ledgers)
