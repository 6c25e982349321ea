"""Small networks and tasks for the tests of the core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import weft


def conv_net() -> nn.Sequential:
    """Two convolutions with batch normalisation: (rows, 3, 8, 8) to (rows, 6)."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mlp() -> nn.Sequential:
    """Two linear layers with layer normalisation: (rows, 4) to (rows, 5)."""
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5))


def images(rows: int = 4) -> Tensor:
    """(rows, 3, 8, 8)."""
    return torch.randn(rows, 3, 8, 8)


def vectors(rows: int = 4) -> Tensor:
    """(rows, 4)."""
    return torch.randn(rows, 4)


def squared(output: Tensor, _: Any) -> Tensor:
    """A loss that needs no target."""
    return output.square().sum()


NO_HEAD = weft.Task(head=None, loss=squared)


def model_of(
    base: nn.Module, plan: weft.Sharing | None = None, *tasks: str, example: Any = None
) -> weft.MultiTaskModel:
    """A model with headless tasks (default: a and b); default plan: full fine-tuning."""
    model = weft.MultiTaskModel(base, plan or weft.full_finetune(base), example=example)
    for name in tasks or ("a", "b"):
        model.add_task(name, NO_HEAD)
    return model


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a module by name."""
    return {k: v.detach().clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
