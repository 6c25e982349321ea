"""Every option of every method refuses what it cannot be, by its own name."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.registry import METHODS

WRONG = (-1, 0, 2.5, math.nan, math.inf, "x", "1", True, None, [], [1], ["x"], {}, object())

INPUTS = ("base", "example", "responses")


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.layer(x)))


def net() -> nn.Module:
    """A network that every method has something to do for."""
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), depthwise, nn.Flatten())


def options() -> list[tuple[str, str]]:
    """Every method with every option that it has."""
    return [
        (method, option)
        for method, about in METHODS.items()
        for option in inspect.signature(about.plan).parameters
        if option not in INPUTS
    ]


def test_names_that_can_be_read_once_are_read_once() -> None:
    base = net()
    names = ["0", "1"]
    expected = METHODS["hard_sharing"].plan(base, own=names, batchnorm="follow").patches
    found = METHODS["hard_sharing"].plan(base, own=iter(names), batchnorm="follow").patches
    assert found.keys() == expected.keys()
    assert found


@pytest.mark.parametrize(("method", "option"), options())
def test_options_are_taken_or_refused_by_name(method: str, option: str) -> None:
    plan, base = METHODS[method].plan, net()
    known = inspect.signature(plan).parameters
    given: dict[str, Any] = {"example": torch.zeros(2, 3, 8, 8)} if "example" in known else {}
    refused = []
    for value in WRONG:
        try:
            plan(base, **given, **{option: value})
        except WeftError as error:
            # An empty list may be no mistake, and find nothing to do.
            refused += [str(error)] if value not in ([], {}) else []
    assert len(refused) >= 3
    assert all(f"{option}=" in words or "'x'" in words for words in refused)
