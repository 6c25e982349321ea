"""Small residual networks for the tests of block policies, and models on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import weft

NO_HEAD = weft.Task(head=None, loss=lambda output, _: output.square().sum())


class Block(nn.Module):
    """relu(shortcut(x) + F(x)) with one convolution; counts its calls and the rows that it saw."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.down: nn.Module | None = None
        if inputs != outputs or stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.rows.append(x.shape[0])
        around = x if self.down is None else self.down(x)
        return (around + self.norm(self.conv(x))).relu()


class Net(nn.Module):
    """A stem, four blocks of which the second is a projection, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6, 2), Block(6, 6), Block(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


BLOCKS = tuple(f"blocks.{i}" for i in range(4))
SHORTCUTS = {"blocks.0": "", "blocks.1": "down", "blocks.2": "", "blocks.3": ""}


def net(seed: int = 0) -> Net:
    """A network with statistics that look trained."""
    torch.manual_seed(seed)
    base = Net()
    base.train()
    with torch.no_grad():
        for _ in range(3):
            base(images(8))
    return base


def images(rows: int = 6) -> Tensor:
    """(rows, 3, 8, 8)."""
    return torch.randn(rows, 3, 8, 8)


def model_of(base: nn.Module, plan: weft.Sharing, *tasks: str) -> weft.MultiTaskModel:
    """A model with headless tasks (default: a and b)."""
    model = weft.MultiTaskModel(base, plan)
    for name in tasks or ("a", "b"):
        model.add_task(name, NO_HEAD)
    return model


def choose(model: weft.MultiTaskModel, task: str, execute: str, **more: Any) -> None:
    """Fix a task's policy, one digit per block, and fill other own tensors of all blocks."""
    own = model.tasks[task].own
    with torch.no_grad():
        for block, digit in zip(model.sharing.options["blocks"], execute, strict=True):
            own[f"{block}:temperature"].fill_(0.0)
            own[f"{block}:execute"].fill_(digit == "1")
            for name, value in more.items():
                if f"{block}:{name}" in own:
                    own[f"{block}:{name}"].copy_(torch.as_tensor(value))


def learn(model: weft.MultiTaskModel, temperature: float = 1.0) -> None:
    """Let all policies of all tasks be learned."""
    for task in model.task_names:
        for block in model.sharing.options["blocks"]:
            model.tasks[task].own[f"{block}:temperature"].fill_(temperature)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a module by name."""
    return {k: v.detach().clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
