"""A residual block that a task executes for some of its inputs, by a gate that all tasks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.adapter import Adapter, Call, Insertion
from weft.core.sites import named_tensors
from weft.errors import PlanError

from .block_policy import Draw, PolicyAdapter

Decision = Literal["argmax", "sample"]
"""How a gate decides in eval mode: the likelier way, or at random by its probability."""


@final
@dataclass(frozen=True)
class InstanceGate(Insertion):
    """Inserts a task's policy for a residual block, refined by a gate that reads the block's input.

    Where the task executes the block and is gated, each row runs through the block or around it.
    In training both ways are computed for all rows; in eval mode the block computes only the rows
    that execute it. The rows' gates are recorded under "gate".

    Source: DynaShare, gates as in ConvNet-AIG (Veit, Belongie, ECCV 2018).

    Args:
        channels: channels of the block's input.
        channel_dim: the dimension of the input that holds them, 1 or -1.
        shortcut: as in `BlockPolicy`.
        evaluation: as in `BlockPolicy`.
        decision: how the gate decides in eval mode.
        width: hidden features of the gate.
    """

    channels: int
    channel_dim: int = 1
    shortcut: str = ""
    evaluation: Draw = "likely"
    decision: Decision = "argmax"
    width: int = 16

    @property
    def trains_shared(self) -> bool:
        return True

    def build(self, site: nn.Module) -> Adapter:
        gate = Gate(self.channels, self.channel_dim, self.width)
        return GatedPolicy(site, self.shortcut, self.evaluation, gate, self.decision)


@final
class Gate(nn.Module):
    """Average over places, two linear layers: scores (rows, 2) to skip and to execute a block.

    Args:
        channels: of the input.
        channel_dim: the dimension of the input that holds them.
        width: hidden features.
    """

    def __init__(self, channels: int, channel_dim: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, width)
        self.norm = nn.BatchNorm1d(width)
        self.choose = nn.Linear(width, 2)
        for layer in (self.squeeze, self.choose):
            nn.init.normal_(layer.weight, std=0.01)
        self._channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """(rows, C, ...) or (rows, ..., C) -> (rows, 2)."""
        if x.dim() > 2:
            first = 2 if self._channel_dim == 1 else 1
            x = x.mean(tuple(range(first, first + x.dim() - 2)))
        scores: Tensor = self.choose(F.relu(self.norm(self.squeeze(x))))
        return scores


@final
class GatedPolicy(PolicyAdapter):
    """A task's choice, refined per input where ``gated`` (an own buffer) is set.

    Args:
        block: the site.
        shortcut: its child that goes around the branch, or "".
        evaluation: how the block is chosen in eval mode while the choice is learned.
        gate: shared by all tasks.
        decision: how the gate decides in eval mode.
    """

    gated: Tensor

    def __init__(
        self, block: nn.Module, shortcut: str, evaluation: Draw, gate: Gate, decision: Decision
    ) -> None:
        super().__init__(block, shortcut, evaluation)
        self.gate = gate.to(self.logits)
        self.register_buffer("gated", torch.zeros_like(self.execute))
        self._decision = decision

    def shared_names(self) -> frozenset[str]:
        return frozenset(f"gate.{name}" for name, _ in named_tensors(self.gate))

    def executed(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        if not self.gated:
            return inner(*args)
        x: Tensor = args[0]
        scores = self.gate(x)
        if self.training:
            soft = F.gumbel_softmax(scores)[:, 1]
            # Values of exactly 0 and 1 with the gradient of the soft sample.
            gate = (soft > 0.5).to(soft) + (soft - soft.detach())
            call.records[site] = {"gate": gate}
            return self.mixed(_over(x, gate), call, site, inner, *args)
        gate = self._opened(scores)
        call.records[site] = {"gate": gate}
        if gate.shape[0] == 1:
            return inner(*args) if gate.item() else self.around(x)
        index = gate.nonzero()[:, 0]
        if index.shape == gate.shape:
            return inner(*args)
        if not index.numel():
            return self.around(x)
        return self._some(index, gate, inner, *args)

    def _some(self, index: Tensor, gate: Tensor, inner: Callable[..., Any], *args: Any) -> Tensor:
        """The rows of the index by the block, the others around it.

        Indexing keeps the order of memory (channels last); index_select and index_copy do not.
        """
        x: Tensor = args[0]
        executed: Tensor = inner(x[index], *args[1:])
        if not self._shortcut:
            return x.to(executed.dtype).index_put((index,), executed)
        others = gate.logical_not().nonzero()[:, 0]
        joined = torch.cat([executed, self.around(x[others])])
        return joined[torch.cat([index, others]).argsort()]

    def _opened(self, scores: Tensor) -> Tensor:
        """Which rows execute the block in eval mode, (rows,), as zeros and ones."""
        if self._decision == "argmax":
            return scores.argmax(1)
        return torch.bernoulli(scores.detach().softmax(1)[:, 1])

    def rows(self, x: Tensor) -> Tensor:
        return ~self.gated | (_over(x, self._opened(self.gate(x))) > 0)

    def folded(self, site: nn.Module) -> nn.Module:
        if self.gated:
            raise PlanError(
                "A gate that decides for each input has no plain form: a folded network runs the "
                "same blocks for all inputs."
            )
        return site


def _over(x: Tensor, gate: Tensor) -> Tensor:
    """A number per row, (rows,), in a shape that broadcasts over the rows' features."""
    return gate.reshape(-1, *(1,) * (x.dim() - 1))
