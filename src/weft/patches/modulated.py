"""Weights as a product of a task's modulator and a shared filter bank."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from weft.core.patch import Patch


def basis_key(name: str) -> str:
    """The key of the shared basis U of the outputs of a layer, (out, rank)."""
    return f"{name}:basis"


def bank_key(name: str) -> str:
    """The key of its shared filter bank U^T W, (rank, ...)."""
    return f"{name}:bank"


@dataclass(frozen=True)
class Modulated(Patch):
    """W_t = M_t B with a shared bank B of ``rank`` filters and the task's own modulator M_t.

    The modulator is stored as its distance D to where it starts, the basis U: M = U + D. Without a
    rank, U is the identity and B the base's weight. With ``normalised`` each row of M is
    ``g_i |U_i| M_i / |M_i|`` with own numbers g, at first 1.

    Args:
        rank: filters of the bank; 0 for the weight itself.
        normalised: whether rows have lengths of their own.
    """

    rank: int = 0
    normalised: bool = True
    needs_frozen_base = True

    def keys(self, name: str) -> tuple[str, ...]:
        keys = (f"{name}:modulator",)
        return (*keys, f"{name}:gain") if self.normalised else keys

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        outputs = base.shape[0]
        found: dict[str, Tensor] = {
            f"{name}:modulator": nn.Parameter(base.new_zeros(outputs, self.rank or outputs))
        }
        if self.normalised:
            found[f"{name}:gain"] = nn.Parameter(base.new_ones(outputs))
        return found

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        distance = tensors[f"{name}:modulator"]
        if self.rank:
            basis, bank = tensors[basis_key(name)], tensors[bank_key(name)]
        else:
            basis, bank = torch.eye(len(base)).to(distance), base
        modulator = basis + distance
        if self.normalised:
            length = basis.norm(dim=1) * tensors[f"{name}:gain"]
            modulator = modulator * (length / modulator.norm(dim=1).clamp(min=1e-12))[:, None]
        return (modulator @ bank.flatten(1)).view(base.shape)

    def harden(
        self,
        name: str,
        base: Tensor,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        return self, {key: tensors[key] for key in self.keys(name)}


@dataclass(frozen=True)
class Offset(Patch):
    """The task owns the whole tensor; it starts at the base's plus stored numbers.

    Args:
        numbers: float32 in base64, as many as the tensor has.
    """

    numbers: str

    def keys(self, name: str) -> tuple[str, ...]:
        return (name,)

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        raw = np.frombuffer(base64.b64decode(self.numbers), np.float32).copy()
        value = base.detach() + torch.from_numpy(raw).view(base.shape).to(base)
        return {name: nn.Parameter(value) if isinstance(base, nn.Parameter) else value}

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return tensors[name]

    def harden(
        self,
        name: str,
        base: Tensor,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        return self, {name: tensors[name]}


def offset(numbers: Tensor) -> Offset:
    """The patch that adds these numbers at the start."""
    raw = numbers.detach().float().cpu().numpy().tobytes()
    return Offset(base64.b64encode(raw).decode())
