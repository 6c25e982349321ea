"""What comes of merging: a model on one base, with the heads of all its tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sites import tensor_slots
from weft.core.state import TaskState
from weft.methods.baselines import linear_probe


@dataclass(frozen=True)
class Merged:
    """What came of merging.

    Args:
        model: the merged base with the head of every task; a model like any other, so it can be
            evaluated, stored in a bank and reported on.
        how: the rule.
        scale: of the merged direction.
        scores: by candidate scale, by task, the validation score; empty if none was chosen.
        baseline: likewise for task arithmetic, where another rule's scale was chosen.
        means: by candidate scale, what chose it, larger is better: the mean score over tasks,
            negative where smaller scores are better; where the tasks' metrics differ, minus the
            mean loss. -infinity where a score is NaN.
        baseline_means: likewise for task arithmetic.
        warnings: what to be wary of.
    """

    model: MultiTaskModel
    how: str
    scale: float
    scores: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    baseline: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    means: Mapping[float, float] = field(default_factory=dict)
    baseline_means: Mapping[float, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The merged base."""
        return self.model.base


def merged_model(
    source: MultiTaskModel, tasks: Sequence[str], tensors: Mapping[str, Tensor]
) -> MultiTaskModel:
    """The merged base under the heads of the tasks.

    Args:
        source: holds the tasks; not changed.
        tasks: their names.
        tensors: of the merged base, by name; the others stay.
    """
    base = copy.deepcopy(source.base)
    with torch.no_grad():
        for name, table, attribute in tensor_slots(base):
            slot = table[attribute]
            if name in tensors and slot is not None:
                slot.copy_(tensors[name])
    plan = linear_probe(base)
    merged = MultiTaskModel(base, plan, example=source.example, output=source.output)
    for task in tasks:
        state = TaskState(source.tasks[task].task, plan, plan.patches, {})
        state.set_head(copy.deepcopy(source.head(task)))
        merged.install(task, state)
    return merged.train(source.training)
