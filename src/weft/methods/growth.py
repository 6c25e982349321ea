"""How DiSparse drops and grows weights while it trains: as RigL does, with growth by task.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
https://arxiv.org/abs/1911.11134.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.sharing import Taken

from .sparsity import (
    HEAD,
    all_weights,
    apart,
    buffer_of,
    note_overlap,
    set_mask,
    task_gradients,
    task_weights,
)

STALE = "stale"
"""The buffer that remembers the values of weights that were dropped."""


def erk(sizes: Mapping[str, Sequence[int]], density: float, power: float) -> dict[str, float]:
    """Densities of layers by Erdos, Renyi and kernel: d = min(1, e (sum sizes / prod sizes)^power).

    e is such that the densities, weighted by the layers' numbers of weights, make the density.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, https://arxiv.org/abs/1911.11134.

    Args:
        sizes: the shapes of weights by name.
        density: the share of weights that are not zero, in (0, 1].
        power: >= 0.
    """
    count = {name: math.prod(shape) for name, shape in sizes.items()}
    raw = {name: (sum(shape) / count[name]) ** power for name, shape in sizes.items()}
    whole: set[str] = set()
    while True:
        rest = [name for name in sizes if name not in whole]
        wanted = density * sum(count.values()) - sum(count[name] for name in whole)
        scale = wanted / sum(raw[name] * count[name] for name in rest) if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1.0}
        if not over:
            return {name: 1.0 if name in whole else scale * raw[name] for name in sizes}
        whole |= over


@dataclass(frozen=True)
class _ByDensity:
    """What knows how dense each layer is to be.

    Args:
        names: of the weights of the base.
        sparsity: the share of zeros, heads included.
        power: of the densities.
    """

    names: tuple[str, ...]
    sparsity: float
    power: float

    def counts(self, model: MultiTaskModel) -> dict[tuple[str, str], int]:
        """By task ("" for what is shared) and name, how many weights stay."""
        weights = all_weights(model, self.names)
        sizes = {"\0".join(place): weight.shape for place, weight in weights.items()}
        found = erk(sizes, 1.0 - self.sparsity, self.power)
        return {
            place: max(1, round(found["\0".join(place)] * weight.numel()))
            for place, weight in weights.items()
        }


@dataclass(frozen=True)
class RandomMasks(_ByDensity):
    """A preparation: masks at random, of the densities.

    Args:
        seed: of the drawing; every weight draws by its own name.
    """

    seed: int

    def __call__(self, model: MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:  # noqa: ARG002
        """Set masks, and weights that they leave out to zero."""
        counts = self.counts(model)
        for (task, name), weight in all_weights(model, self.names).items():
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{self.seed} {task} {name}".encode())
            )
            noise = torch.rand(weight.shape, generator=generator).to(weight.device)
            set_mask(model, task, name, weight, largest(noise, counts[task, name]))


@dataclass(frozen=True)
class KeepDensities(_ByDensity):
    """A preparation: the largest weights of each layer stay, as many as its density says."""

    def __call__(self, model: MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:  # noqa: ARG002
        """Set masks, and weights that they leave out to zero."""
        counts = self.counts(model)
        for (task, name), weight in all_weights(model, self.names).items():
            keep = buffer_of(model, task, name)
            stay = largest(weight.detach().abs(), counts[task, name], among=keep)
            set_mask(model, task, name, weight, stay)
            if STALE in model.sharing.head_buffers:
                buffer_of(model, task, name, STALE).zero_()


@dataclass(frozen=True)
class DropAndGrow(_ByDensity):
    """A review: layers drop their smallest weights; tasks grow where their gradients are largest.

    With the count k of a layer and zeta = drop / 2 (1 + cos(pi t)) at the share t of the phase, the
    k (1 - zeta) largest weights stay; each task grows the missing ones, and the layer all of these.

    Args:
        drop: zeta at the beginning.
        stale: whether grown weights take up the values with which they were dropped.
    """

    drop: float
    stale: bool

    def __call__(self, model: MultiTaskModel, taken: Taken) -> tuple[Tensor, ...]:
        """Change masks and weights by what a step saw."""
        missing = self.let_go(model, taken.done)
        self._grow(model, self._grown(model, taken, missing))
        return ()

    def let_go(self, model: MultiTaskModel, done: float) -> dict[tuple[str, str], int]:
        """Drop the smallest weights of each layer.

        Args:
            model: whose masks and weights change.
            done: the share of the phase that is over, in [0, 1].

        Returns:
            By task ("" for what is shared) and name, how many weights are missing then.
        """
        zeta = 0.5 * self.drop * (1.0 + math.cos(math.pi * done))
        counts = self.counts(model)
        missing: dict[tuple[str, str], int] = {}
        for (task, name), weight in all_weights(model, self.names).items():
            count, keep = counts[task, name], buffer_of(model, task, name)
            stay = largest(weight.detach().abs(), round(count * (1.0 - zeta)), among=keep)
            missing[task, name] = count - int(stay.sum())
            if self.stale:
                gone, memory = keep & ~stay, buffer_of(model, task, name, STALE)
                memory.copy_(torch.where(gone, weight.detach(), memory))
            set_mask(model, task, name, weight, stay)
        return missing

    def _grown(
        self, model: MultiTaskModel, taken: Taken, missing: Mapping[tuple[str, str], int]
    ) -> dict[str, dict[str, Tensor]]:
        """By task and weight, where the task wants to grow."""
        probe = apart(model, self.names)
        grown = {}
        for task, batch in taken.batches.items():
            gradients = task_gradients(probe, task, self.names, [batch])
            grown[task] = {
                name: largest(
                    gradient,
                    missing[task if name.startswith(HEAD) else "", name],
                    among=~buffer_of(model, task, name),
                )
                for name, gradient in gradients.items()
            }
        return grown

    @torch.no_grad()
    def _grow(self, model: MultiTaskModel, grown: Mapping[str, Mapping[str, Tensor]]) -> None:
        note_overlap(model, self.names, grown)
        for task, wanted in grown.items():
            weights = task_weights(model, task, self.names)
            for name, where in wanted.items():
                buffer_of(model, task, name).logical_or_(where)
                if self.stale:
                    memory = buffer_of(model, task, name, STALE)
                    weights[name].copy_(torch.where(where, memory, weights[name]))


def largest(values: Tensor, count: int, *, among: Tensor | None = None) -> Tensor:
    """A mask of the largest values, the first ones of equal ones.

    Args:
        values: of any shape, >= 0.
        count: how many; fewer if there are no more.
        among: a mask of those that can be chosen.
    """
    known = values if among is None else torch.where(among, values, -1.0)
    order = known.reshape(-1).argsort(descending=True, stable=True)
    most = values.numel() if among is None else int(among.sum())
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[: max(0, min(count, most))]] = True
    return mask.view(values.shape)
