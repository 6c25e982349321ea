"""Small networks whose tasks are moved at random, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import weft


class Net(nn.Module):
    """Tied weights, batch normalisation, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.norm(self.first(x)).relu())
        return out


def make_base(dtype: torch.dtype = torch.float32) -> Net:
    """The same network each time."""
    torch.manual_seed(0)
    return Net().to(dtype)


def model_of(
    tasks: int = 3,
    plan: Callable[[nn.Module], weft.Sharing] = weft.full_finetune,
    dtype: torch.dtype = torch.float32,
) -> weft.MultiTaskModel:
    """Tasks whose own tensors were moved at random."""
    base = make_base(dtype)
    model = weft.MultiTaskModel(base, plan(base), example=torch.zeros(2, 6, dtype=dtype))
    with torch.no_grad():
        for i in range(tasks):
            model.add_task(f"t{i}", weft.Classification(3))
            for tensor in model.tasks[f"t{i}"].own.values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.rand_like(tensor))
    return model.eval()


def composed(model: weft.MultiTaskModel, task: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model.tensors(task))


def batches(seed: int = 0, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, 6, generator=generator),
            torch.randint(0, 3, (rows,), generator=generator),
        )
        for _ in range(2)
    ]


def data(model: weft.MultiTaskModel) -> dict[str, Any]:
    """Batches whose targets are what the task itself answers."""
    found = {}
    for i, task in enumerate(model.task_names):
        with torch.no_grad():
            found[task] = [(x, model(x, task=task).argmax(1)) for x, _ in batches(i)]
    return found


def tensors(model: weft.MultiTaskModel) -> dict[str, Tensor]:
    """The base's parameters by name."""
    return {n: t.detach() for n, t in model.base.named_parameters()}
