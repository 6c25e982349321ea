"""A small residual network for tables, and five crime rates as regression tasks on one input."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

FILE = Path("data/communities_crime.npz")
COLUMNS, WIDTH, BLOCKS = 102, 64, 4
SPLITS = ("train", "val", "test")


class Block(nn.Module):
    """x + linear(relu(linear(norm(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(self.norm(x)).relu())


def residual_mlp() -> nn.Module:
    """(B, 102) standardised columns to (B, 64) features; drawn at random."""
    stem = nn.Linear(COLUMNS, WIDTH)
    return nn.Sequential(stem, *(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH))


def _rate(name: str) -> dict[str, npt.NDArray[Any]]:
    """The columns, and one rate as log(1 + rate) in units of its deviation over training rows."""
    with np.load(FILE) as arrays:
        columns = {f"x_num_{split}": arrays[f"x_num_{split}"] for split in SPLITS}
        rates = {f"y_{split}": np.log1p(arrays[f"y_{name}_{split}"]) for split in SPLITS}
    centre, spread = rates["y_train"].mean(), rates["y_train"].std()
    return columns | {key: (rate - centre) / spread for key, rate in rates.items()}


murders = partial(_rate, "murdPerPop")
robberies = partial(_rate, "robbbPerPop")
burglaries = partial(_rate, "burglPerPop")
car_thefts = partial(_rate, "autoTheftPerPop")
arsons = partial(_rate, "arsonsPerPop")
