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
    """``price * sum_i share_i |s_i|`` over the gate scores of each task.

    Args:
        weight: the price, where it is fixed.
        scores: keys of the scores.
        shares: what each score weighs, usually one over the number of gates.
        price: key of a task's own tensor that holds its price in place of ``weight``.
    """

    weight: float
    scores: tuple[str, ...]
    shares: tuple[float, ...]
    price: str | None = None

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        total = next(iter(shared.values()), torch.zeros(())).new_zeros((), dtype=torch.float32)
        for tensors in own.values():
            # A hardened task has no scores left and pays nothing.
            if self.scores[0] in tensors:
                scores = torch.stack([tensors[key] for key in self.scores])
                price = self.weight if self.price is None else tensors[self.price]
                total = total + price * (scores.abs() * scores.new_tensor(self.shares)).sum()
        return total

    def figures(self, own: Mapping[str, Tensor]) -> dict[str, float]:
        if self.price is None or self.price not in own:
            return {}
        return {"price": float(own[self.price])}
