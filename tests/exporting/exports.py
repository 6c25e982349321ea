"""What the tests of exporting share."""

from __future__ import annotations

import plain_nets
import torch
from torch import Tensor

from laws.bases import Base, images
from laws.cases import Case

SMALL = Base(
    "small",
    plain_nets.Small,
    images(),
    frozenset({"layer", "bias", "norm", "batchnorm", "depthwise", "blocks"}),
)
HANDING = Base("handing", plain_nets.Handing, images(), SMALL.has)
BARE = Base("bare", plain_nets.Bare, images(), frozenset({"layer", "bias"}))


def words(rows: int) -> dict[str, Tensor]:
    """Inputs by keyword, of three types, for `plain_nets.Tied`."""
    return {
        "scale": torch.rand(rows),
        "mask": torch.rand(rows, 5) > 0.3,
        "ids": torch.randint(0, 11, (rows, 5)),
    }


TIED = Base("tied", plain_nets.Tied, words, frozenset({"layer", "bias", "embedding"}))

NOT_EXPORTED = {"dynashare": "A gate that decides for each input has no plain form"}
"""Methods whose tasks do not leave, and why."""

__all__ = ["BARE", "HANDING", "NOT_EXPORTED", "SMALL", "TIED", "Case", "words"]
