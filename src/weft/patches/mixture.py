"""A mixture: the tensor that a task uses is a weighted sum of a few that all tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.patch import Patch
from weft.errors import PlanError


def bases_key(name: str) -> str:
    """The key of the shared tensors that are mixed for the base tensor ``name``, (K, *shape)."""
    return f"{name}:bases"


@dataclass(frozen=True)
class Mixture(Patch):
    """theta_t = sum_k w_tk Phi_k with the task's own numbers w_t and shared Phi.

    New numbers are a random point whose coordinates are at least zero and sum to one, so that equal
    bases mix to what they are, up to rounding.

    Args:
        coefficients: key of the task's numbers; patches that name the same key share them.
        count: K.
        softmax: whether the weights are the softmax of the numbers.
    """

    coefficients: str
    count: int
    softmax: bool = False

    def keys(self, name: str) -> tuple[str, ...]:  # noqa: ARG002
        return (self.coefficients,)

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        # Exponential variables over their sum are uniform among such points.
        drawn = torch.empty(self.count, dtype=torch.float64).exponential_()
        point = drawn / drawn.sum()
        return {self.coefficients: nn.Parameter((point.log() if self.softmax else point).to(base))}

    def check_shared(self, name: str, shared: Mapping[str, Tensor]) -> None:
        key = bases_key(name)
        if key not in shared or shared[key].shape[0] != self.count:
            found = "none" if key not in shared else str(shared[key].shape[0])
            raise PlanError(
                f"A task mixes {self.count} bases of '{name}', and its model has {found}. Make the "
                f"model by weft.paco(base, k={self.count}), and add to it tasks with plans of that "
                "k."
            )

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        self.check_shared(name, tensors)
        key, numbers = bases_key(name), tensors[self.coefficients]
        weights = numbers.softmax(0) if self.softmax else numbers
        mixed: Tensor = torch.tensordot(weights.to(tensors[key].dtype), tensors[key], 1)
        return mixed

    def harden(
        self,
        name: str,  # noqa: ARG002
        base: Tensor,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        return self, {self.coefficients: tensors[self.coefficients]}
