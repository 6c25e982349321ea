"""How sure a network on merged tensors is of its predictions, by inputs without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.rows import call_arguments, select_output
from weft.errors import DataError, TrainingError
from weft.training.batches import split_batch, to_device

from .vectors import Vector, precise


@dataclass(frozen=True)
class Figures:
    """What was seen at a step of the training.

    Args:
        entropy: mean over tasks of the entropy of single predictions, in nats.
        diversity: mean over tasks of the entropy of the mean prediction of a batch, over the
            logarithm of the classes: 1 if all classes are predicted alike, 0 if only one is.
    """

    entropy: float
    diversity: float


def collapse(first: Figures, last: Figures) -> tuple[str, ...]:
    """A warning if predictions became sure by becoming all the same.

    Args:
        first: before training.
        last: after it.
    """
    if last.entropy < first.entropy and last.diversity < 0.8 * first.diversity:
        return (
            f"Predictions collapsed: their entropy fell from {first.entropy:.3f} to "
            f"{last.entropy:.3f}, and with it how evenly classes are predicted, from "
            f"{first.diversity:.2f} to {last.diversity:.2f}. Compare with task arithmetic on "
            "labelled validation data, use fewer steps, or diversity=1.",
        )
    return ()


class Stream:
    """Batches of one task's inputs, without end.

    Args:
        batches: with or without targets.
        task: the task's name, for errors.
        device: where the inputs go.
    """

    def __init__(self, batches: Any, task: str, device: torch.device) -> None:
        self._batches, self._task, self._device = batches, task, device
        self._running: Iterator[Any] = iter(())
        self._given = 0

    def next(self) -> Any:
        """The inputs of the next batch, from the start again after the last one.

        Raises:
            DataError: there is none, or it is no batch.
        """
        batch = next(self._running, None)
        if batch is None:
            self._running = iter(self._batches)
            batch = next(self._running, None)
        if batch is None:
            raise DataError(self._ended())
        self._given += 1
        return to_device(self._inputs(batch), self._device)

    def _inputs(self, batch: Any) -> Any:
        if isinstance(batch, Tensor) or (isinstance(batch, Mapping) and "labels" not in batch):
            return batch
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0]
        return split_batch(batch, self._task)[0]

    def _ended(self) -> str:
        if not self._given:
            return f"The data of '{self._task}' is empty. Give batches of its inputs."
        return (
            f"The data of '{self._task}' can be read only once, and ended after {self._given} "
            "batches. Give a DataLoader or a list of batches, which start again, or fewer steps."
        )


class Predictions:
    """The entropy of the tasks' predictions.

    Args:
        model: the tasks with their heads, in eval mode; its parameters do not train.
        streams: by task, its inputs.
        diversity: weight of the entropy of the mean prediction, >= 0.
    """

    def __init__(
        self, model: MultiTaskModel, streams: Mapping[str, Stream], diversity: float
    ) -> None:
        self._model, self._streams, self._diversity = model, streams, diversity
        self._fixed = {n: t.detach() for n, t in model.tensors(model.task_names[0]).items()}

    def loss(self, tensors: Vector) -> Tensor:
        """The entropy of predictions on the tasks' next batches, summed over tasks.

        Args:
            tensors: of the base, in the place of the model's.

        Raises:
            DataError: outputs that are no class scores.
            TrainingError: an entropy that is not finite.
        """
        entropies, spreads = self._predicted(tensors, relative=False)
        return torch.stack(entropies).sum() - self._diversity * torch.stack(spreads).sum()

    @torch.no_grad()
    def figures(self, tensors: Vector) -> Figures:
        """Entropy and diversity on the next batches; see `loss`."""
        entropies, spreads = self._predicted(tensors, relative=True)
        return Figures(float(torch.stack(entropies).mean()), float(torch.stack(spreads).mean()))

    def _predicted(self, tensors: Vector, *, relative: bool) -> tuple[list[Tensor], list[Tensor]]:
        bound = {**self._fixed, **tensors}
        entropies, spreads = [], []
        for task, stream in self._streams.items():
            logs = precise(self._scores(task, bound, stream.next())).log_softmax(1)
            entropy = -(logs.exp() * logs).sum(1).mean()
            if not bool(torch.isfinite(entropy)):
                raise TrainingError(
                    f"The entropy of the predictions of '{task}' is not finite. Look for NaN or "
                    "infinity in its inputs and outputs; lower lr and scale; or merge on a base "
                    "in float32."
                )
            mean = logs.exp().mean(0)
            spread = -(mean * mean.clamp(min=1e-12).log()).sum()
            entropies.append(entropy)
            spreads.append(spread / math.log(logs.shape[1]) if relative else spread)
        return entropies, spreads

    def _scores(self, task: str, tensors: Vector, inputs: Any) -> Tensor:
        args, kwargs = call_arguments((inputs,), {})
        output = self._model.view(task).bind(tensors)(*args, **kwargs)
        features = select_output(output, self._model.output)
        head = self._model.head(task)
        scores = features if head is None else head(features)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
            raise DataError(
                f"The outputs of '{task}' are no class scores of shape (rows, classes); entropy "
                "has no meaning there. Merge it by another rule."
            )
        return scores
