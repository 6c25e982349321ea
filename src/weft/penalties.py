"""Penalties: what is charged for owning, and for choosing blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.core.adapter import Records
from weft.core.sharing import Penalty
from weft.errors import PlanError


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


@dataclass(frozen=True)
class TieToMean(Penalty):
    """What it costs that tasks differ from a mean, which is a shared tensor for each own one.

    ``weight / 2 sum_t sum_i |theta_ti - Theta_i|^2`` ("squared": a Gaussian prior of this
    precision), or ``weight sum_t sum_i |theta_ti - Theta_i|`` over tensors i ("norm").

    Args:
        weight: the price.
        keys: of the own tensors.
        mean: what the key of a mean begins with; None if all means are zero.
        form: which of the two.
        learned: whether the mean learns from these tasks as well.

    Raises:
        PlanError: a mean is not there, or is of another shape.
    """

    weight: float
    keys: tuple[str, ...]
    mean: str | None
    form: Literal["squared", "norm"] = "squared"
    learned: bool = True

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        total = next(iter(shared.values()), torch.zeros(())).new_zeros((), dtype=torch.float32)
        for tensors in own.values():
            # Gates that are final leave other tensors than those that were tied.
            for key in (k for k in self.keys if k in tensors):
                apart = self._apart(key, tensors[key], shared)
                if self.form == "squared":
                    total = total + 0.5 * self.weight * apart.square().sum()
                else:
                    # At distance 0 the norm has no gradient, and 0 is one of its subgradients.
                    squared = apart.square().sum()
                    norm = torch.where(squared > 0, squared, 1.0).sqrt()
                    total = total + self.weight * torch.where(squared > 0, norm, 0.0)
        return total

    def check_shared(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
        for key in self.keys if self.mean is not None else ():
            if key in own:
                self._mean(key, own[key], shared)

    def _apart(self, key: str, own: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        if self.mean is None:
            return own
        mean = self._mean(key, own, shared)
        return own - (mean if self.learned else mean.detach())

    def _mean(self, key: str, own: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        mean = shared.get(f"{self.mean}{key}")
        if mean is None or mean.shape != own.shape:
            found = "has none" if mean is None else f"has one of shape {tuple(mean.shape)}"
            raise PlanError(
                f"A task is tied to a mean of shape {tuple(own.shape)} for '{key}', and its model "
                f"{found}. Make the model by the same plan with mean='trained'."
            )
        return mean


PolicyForm = Literal["paper", "code"]
"""Which form of AdaShare's losses: the paper's, or the authors' code's."""


@dataclass(frozen=True)
class PolicySparsity(Penalty):
    """What executing residual blocks costs, over the blocks whose policy is being learned.

    With p the probability of executing a block: ``weight * sum_{task, block} log p`` (paper), or
    ``weight * sum_task mean_block -log(1 - p)`` (code).

    Source: Sun, Panda, Feris, Saenko, AdaShare, NeurIPS 2020.

    Args:
        weight: the price.
        blocks: sites of the blocks.
        form: which of the two.
    """

    weight: float
    blocks: tuple[str, ...]
    form: PolicyForm = "paper"

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        logits, learned = _policies(own, self.blocks)
        execute, skip = logits.log_softmax(2).unbind(2)
        if self.form == "paper":
            return self.weight * (learned * execute).sum()
        return -self.weight * ((learned * skip).sum(1) / learned.sum(1).clamp(min=1)).sum()

    def figures(self, own: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean probability of executing a block whose policy is being learned."""
        logits, learned = _policies({"": own}, self.blocks)
        if not learned.any():
            return {}
        execute = logits.detach().softmax(2)[:, :, 0]
        return {"executed": float((learned * execute).sum() / learned.sum())}


@dataclass(frozen=True)
class PolicySharing(Penalty):
    """What it costs if tasks differ in the blocks that they execute, while policies are learned.

    Over all pairs of tasks and the blocks l = 0 .. L-1 in the order in which they run: ``weight *
    sum (L - l) / L * |p_i - p_j|`` with the probabilities of executing a block (paper), or ``weight
    * sum (l + 1) / L * |a_i - a_j|`` with the logits of executing it (code).

    Source: Sun, Panda, Feris, Saenko, AdaShare, NeurIPS 2020.

    Args:
        weight: the price.
        blocks: sites of the blocks, in the order in which they run.
        form: which of the two.
    """

    weight: float
    blocks: tuple[str, ...]
    form: PolicyForm = "paper"

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        logits, learned = _policies(own, self.blocks)
        count = len(self.blocks)
        late = torch.arange(1, count + 1, device=logits.device).to(logits) / count
        choice = logits.softmax(2)[:, :, 0] if self.form == "paper" else logits[:, :, 0]
        emphasis = late.flip(0) if self.form == "paper" else late
        one, other = torch.triu_indices(len(own), len(own), 1, device=logits.device)
        apart = (choice[one] - choice[other]).abs() * learned[one] * learned[other]
        return self.weight * (apart * emphasis).sum()


@dataclass(frozen=True)
class GateRate(Penalty):
    """``weight * sum_task 1/L sum_l (t_l - mean_rows gate_l)^2`` over the gates that took part.

    Source: DynaShare.

    Args:
        weight: the price.
        targets: by the site of a gated block, the share t of rows that should execute it.
        blocks: L, the number of all blocks, gated or not.
    """

    weight: float
    targets: tuple[tuple[str, float], ...]
    blocks: int
    needs_records = True

    def __call__(
        self,
        records: Mapping[str, Records],
        own: Mapping[str, Mapping[str, Tensor]],  # noqa: ARG002
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        total = next(iter(shared.values()), torch.zeros(())).new_zeros((), dtype=torch.float32)
        for sites in records.values():
            for site, target in self.targets:
                if site in sites:
                    rate = sites[site]["gate"].float().mean()
                    total = total + self.weight / self.blocks * (target - rate).square()
        return total


def _policies(
    own: Mapping[str, Mapping[str, Tensor]], blocks: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Logits (tasks, blocks, 2), and 1 where a block's policy is being learned (tasks, blocks)."""
    logits = torch.stack([torch.stack([t[f"{b}:logits"] for b in blocks]) for t in own.values()])
    taus = torch.stack([torch.stack([t[f"{b}:temperature"] for b in blocks]) for t in own.values()])
    return logits, (taus > 0).to(logits)
