"""How a policy over blocks is learned: functions of phases that write the adapters' buffers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.adapters.block_policy import Draw
from weft.core.model import MultiTaskModel


@dataclass(frozen=True)
class ExecuteAll:
    """Before an epoch: every task executes every block.

    Args:
        blocks: sites of the blocks.
    """

    blocks: tuple[str, ...]

    def __call__(
        self,
        model: MultiTaskModel,
        tasks: tuple[str, ...],
        epoch: int,  # noqa: ARG002
        epochs: int,  # noqa: ARG002
    ) -> None:
        """Write the buffers of the tasks' policies."""
        for task in tasks:
            for block in self.blocks:
                _set(model.tasks[task].own, block, temperature=0.0, execute=True, gated=False)


@dataclass(frozen=True)
class LearnPolicies:
    """Before an epoch: the last blocks are learned, more of them as time goes by, ever less softly.

    Args:
        blocks: sites of the blocks, in the order in which they run.
        curriculum: the share of the epochs after which all are learned.
        start: the temperature of the first epoch.
        end: the temperature of the last epoch.
    """

    blocks: tuple[str, ...]
    curriculum: float
    start: float
    end: float

    def count(self, epoch: int, epochs: int) -> int:
        """How many blocks are learned, from the last one; one more every s epochs."""
        total = len(self.blocks)
        if self.curriculum == 0.0:
            return total
        return min(total, 1 + math.floor(epoch * total / (self.curriculum * epochs)))

    def temperature(self, epoch: int, epochs: int) -> float:
        """The temperature of an epoch."""
        return float(self.start * (self.end / self.start) ** (epoch / max(1, epochs - 1)))

    def __call__(
        self, model: MultiTaskModel, tasks: tuple[str, ...], epoch: int, epochs: int
    ) -> None:
        """Write the buffers of the tasks' policies."""
        first = len(self.blocks) - self.count(epoch, epochs)
        for task in tasks:
            for place, block in enumerate(self.blocks):
                heat = self.temperature(epoch, epochs) if place >= first else 0.0
                _set(model.tasks[task].own, block, temperature=heat, execute=True, gated=False)


@dataclass(frozen=True)
class FixPolicies:
    """At the end of policy learning: what was learned becomes a choice, and gates open for work.

    A block that was not learned in the time executes.

    Args:
        blocks: sites of the blocks.
        final: whether choices are drawn.
        seed: of the drawing; each task draws by its name, whatever other tasks there are.
    """

    blocks: tuple[str, ...]
    final: Draw
    seed: int

    def __call__(
        self,
        model: MultiTaskModel,  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Mapping[str, Tensor | None]],  # noqa: ARG002
    ) -> None:
        """Write the buffers of the tasks' policies."""
        for task, tensors in own.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {task}".encode()))
            for block in self.blocks:
                chance = float(tensors[f"{block}:logits"].detach().double().softmax(0)[0])
                drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
                execute = drawn < chance if self.final == "sample" else chance >= 0.5
                learned = bool(tensors[f"{block}:temperature"] > 0)
                choice = execute or not learned
                _set(tensors, block, temperature=0.0, execute=choice, gated=True)


def _set(
    own: Mapping[str, Tensor], block: str, *, temperature: float, execute: bool, gated: bool
) -> None:
    own[f"{block}:temperature"].fill_(temperature)
    own[f"{block}:execute"].fill_(execute)
    if f"{block}:gated" in own:
        own[f"{block}:gated"].fill_(gated)
