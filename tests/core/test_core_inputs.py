"""Inputs of a wrong shape are named beside the shape that the base has run on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from weft.errors import DataError


def test_a_wrong_input_shape_is_named_with_the_right_one() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = weft.MultiTaskModel(base, weft.taps(base), example=torch.zeros(1, 3, 8, 8))
    model.add_task("a", weft.Classification(2))
    with pytest.raises(DataError, match=r"\(rows, 1, 8, 8\); it has run on \(rows, 3, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8), task="a")
    assert model(torch.zeros(2, 3, 9, 9), task="a").shape == (2, 2)


def test_running_out_of_memory_is_not_called_a_wrong_shape() -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(2)
            self.linear(torch.zeros(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 2:
                raise torch.OutOfMemoryError("too large")
            return self.linear(x)

    base = Hungry()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 2))
    model.add_task("a", weft.Classification(2))
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        model(torch.zeros(3, 4), task="a")


def test_an_error_of_the_base_itself_is_not_hidden() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x > 1).any()):
                raise RuntimeError("out of something")
            return x * self.weight

    base = Broken()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 2))
    model.add_task("a", weft.Task(head=None, loss=nn.MSELoss()))
    with pytest.raises(RuntimeError, match="out of something") as error:
        model(torch.full((3, 2), 2.0), task="a")
    assert not isinstance(error.value, DataError)


def test_a_base_with_an_input_called_context_gets_it_in_a_dict() -> None:
    class Contextual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + context

    base = Contextual()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    model.add_task("a", weft.Task(head=None, loss=nn.MSELoss()))
    x, c = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(DataError, match="gets it in a dict"):
        model(x, context=c, task="a")
    assert torch.equal(model({"x": x, "context": c}, task="a"), base(x, c))
