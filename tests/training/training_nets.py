"""Small networks, data and helpers for the tests of training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.core.sharing import Sharing

SIZE = 6


def conv_net(seed: int = 0) -> nn.Module:
    """Full and depthwise convolutions with biases and batch normalisation: tiny."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    net(torch.randn(32, 3, SIZE, SIZE))  # statistics that are not the initial ones
    return net


def dense_net(seed: int = 0) -> nn.Module:
    """Linear layers with layer normalisation: nothing depends on who else is in the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8), nn.ReLU())


def images(rows: int, classes: int, seed: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Images whose class can be learned: it shifts a channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    y = torch.randint(classes, (rows,), generator=generator)
    x[:, 0] += y[:, None, None]
    return TensorDataset(x, y)


def vectors(
    rows: int, classes: int, seed: int, dtype: torch.dtype = torch.float32
) -> TensorDataset:
    """Vectors whose class can be learned."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=dtype)
    y = torch.randint(classes, (rows,), generator=generator)
    x[:, 0] += y
    return TensorDataset(x, y)


def shuffled(data: TensorDataset, batch: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in random order, none of one row."""
    return DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)


def in_order(data: TensorDataset, batch: int = 8) -> list[list[Tensor]]:
    """The same batches each time, as a list."""
    return list(DataLoader(data, batch_size=batch, drop_last=True))


def model_of(
    base: nn.Module, plan: Sharing, tasks: Iterable[str] = ("a", "b"), classes: int = 3
) -> weft.MultiTaskModel:
    """A model with classification tasks whose heads are built and fixed by the seed."""
    example = torch.zeros(2, 5) if isinstance(base[0], nn.Linear) else torch.zeros(2, 3, SIZE, SIZE)
    example = example.to(next(base.parameters()).dtype)
    model = weft.MultiTaskModel(base, plan, example=example)
    for index, task in enumerate(tasks):
        torch.manual_seed(100 + index)
        model.add_task(task, weft.Classification(classes))
    return model


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names with the same values, bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """The same names with values that differ by rounding."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name],
            right[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
