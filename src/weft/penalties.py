"""Penalties: what is charged for owning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.adapter import Records
from weft.core.sharing import Penalty


@dataclass(frozen=True)
class L1Scores(Penalty):
    """``weight * sum_i |s_i| / norm`` over the gate scores of each task.

    Args:
        weight: the price of a score.
        scores: keys of the scores.
        norm: what the sum is divided by, usually the number of gates.
    """

    weight: float
    scores: tuple[str, ...]
    norm: int

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        # A hardened task has no scores left and pays nothing.
        scores = [t[key] for t in own.values() for key in self.scores if key in t]
        if not scores:
            return next(iter(shared.values()), torch.zeros(())).new_zeros((), dtype=torch.float32)
        return self.weight / self.norm * torch.stack(scores).abs().sum()
