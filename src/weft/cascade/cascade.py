"""Cascades: the cheapest stage first, the next one only for rows that it is not sure of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from weft.compute import multiply_adds
from weft.core.model import MultiTaskModel
from weft.core.rows import known_task
from weft.errors import DataError, TaskError
from weft.training.batches import Loader, split_batch, to_device
from weft.training.evaluation import device_of, modes_kept

from .curve import Curve, sweep
from .resolutions import Stage, checked_images, resized


class Answers(NamedTuple):
    """What a cascade says of a batch.

    Args:
        output: (rows, classes) logits of the stage at which each row left.
        stage: (rows,) the number of that stage, from 0.
        confidence: (rows,) the largest probability there, float64.
    """

    output: Tensor
    stage: Tensor
    confidence: Tensor


@final
@dataclass(frozen=True, eq=False)
class Cascade:
    """Runs classification tasks one after another, each on the rows the one before was unsure of.

    A row leaves when its largest class probability is at least the threshold: at 0 every row leaves
    at the first stage, over 1 every row reaches the last one. Stages run in eval mode without
    gradients, whatever mode the model is in.

    Source: K for the Price of 1, cost-efficient inference over several resolutions.

    Args:
        model: the model.
        stages: tasks with the side of the square images that each takes, the cheapest first.
        threshold: a number >= 0, the same at all stages.

    Raises:
        TaskError: fewer than two stages, descending sizes, an unknown task, or no threshold.

    May differ from the paper, whose measure of confidence is not known here: the largest
    probability and one threshold for all stages are a reconstruction.
    """

    model: MultiTaskModel
    stages: Sequence[Stage]
    threshold: float = 0.9

    def __post_init__(self) -> None:
        sizes = [size for _, size in self.stages]
        if len(sizes) < 2 or sizes != sorted(sizes) or sizes[0] < 1:
            raise TaskError(
                "A cascade has two stages or more, [(task, size), ...], of sizes from small to "
                f"large; found {list(self.stages)}."
            )
        if not self.threshold >= 0.0:
            raise TaskError(f"Cascade(threshold=...) is a number >= 0, found {self.threshold}.")
        for task, _ in self.stages:
            known_task(task, self.model.task_names)

    def at(self, threshold: float) -> Cascade:
        """The same cascade at another threshold, for instance that of a `Point`."""
        return replace(self, threshold=threshold)

    def __call__(self, images: Tensor) -> Answers:
        """Run each stage on the rows that are left.

        Args:
            images: (rows, C, H, W) floats, as prepared for the largest stage or larger; resized
                here.

        Raises:
            DataError: no images.
            TaskError: a stage is no classification, or has other classes than the first.
        """
        with _inference(self.model):
            output = self._logits(0, images).clone()
            confidence = certainty(output)
            stage = torch.zeros(len(images), dtype=torch.long, device=output.device)
            rest, left = torch.arange(len(images), device=output.device), images
            for k in range(1, len(self.stages)):
                unsure = ~(confidence[rest] >= self.threshold)
                rest, left = rest[unsure], left[unsure]
                if len(rest) == 0:
                    break
                logits = self._logits(k, left)
                if logits.shape[1:] != output.shape[1:]:
                    raise TaskError(
                        f"All stages have the same classes; '{self.stages[k][0]}' has "
                        f"{logits.shape[1]}, the first one {output.shape[1]}."
                    )
                output[rest], stage[rest], confidence[rest] = logits, k, certainty(logits)
        return Answers(output, stage, confidence)

    def multiply_adds(self, images: Tensor) -> tuple[int, ...]:
        """The multiply-adds of one row in each stage, alone.

        Args:
            images: (rows, C, H, W) floats; one row is run.
        """
        row = images[:1]
        return tuple(
            multiply_adds(self.model, resized(row, size), tasks=[task]).of(task)
            for task, size in self.stages
        )

    def evaluate(self, data: Loader) -> dict[str, Any]:
        """The cascade's accuracy and cost on data, as it runs.

        Args:
            data: batches ``(x, y)`` of images and class indices.

        Returns:
            ``{"accuracy": share, "multiply_adds": mean per row, "shares": of rows that leave at
            each stage}``.

        Raises:
            DataError: no data.
        """
        right = 0
        costs: tuple[int, ...] = ()
        leaving = torch.zeros(len(self.stages), dtype=torch.long)
        for x, y in self._batches(data):
            costs = costs or self.multiply_adds(x)
            answers = self(x)
            right += int((answers.output.argmax(1) == y).sum())
            leaving += torch.bincount(answers.stage.cpu(), minlength=len(leaving))
        rows = int(leaving.sum())
        if rows == 0:
            raise DataError("The data of the cascade is empty: there is nothing to evaluate.")
        spent = sum(n * sum(costs[: k + 1]) for k, n in enumerate(leaving.tolist()))
        shares = tuple(n / rows for n in leaving.tolist())
        return {"accuracy": right / rows, "multiply_adds": spent / rows, "shares": shares}

    def curve(self, data: Loader) -> Curve:
        """Accuracy against cost for all thresholds: every stage runs once on every row.

        Args:
            data: batches ``(x, y)`` of images and class indices; validation, not test, to choose.

        Raises:
            DataError: no data, or outputs that are not numbers.
        """
        confidence: list[Tensor] = []
        correct: list[Tensor] = []
        costs: tuple[int, ...] = ()
        for x, y in self._batches(data):
            costs = costs or self.multiply_adds(x)
            with _inference(self.model):
                logits = [self._logits(k, x) for k in range(len(self.stages))]
            confidence.append(torch.stack([certainty(one) for one in logits], 1).cpu())
            correct.append(torch.stack([one.argmax(1) == y for one in logits], 1).cpu())
        if not confidence:
            raise DataError("The data of the cascade is empty: there is nothing to evaluate.")
        table = torch.cat(confidence)
        if not bool(torch.isfinite(table).all()):
            raise DataError("Some outputs of the stages are NaN. Check the inputs and the model.")
        return sweep(table, torch.cat(correct), costs)

    def _logits(self, stage: int, images: Tensor) -> Tensor:
        task, size = self.stages[stage]
        output = self.model(resized(images, size), task=task)
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
            raise TaskError(
                f"A stage of a cascade gives logits (rows, classes); '{task}' does not."
            )
        return output

    def _batches(self, data: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data:
            x, y = to_device(split_batch(batch, "the cascade"), device_of(self.model))
            yield checked_images(x), y


def certainty(logits: Tensor) -> Tensor:
    """The largest class probability of each row, (rows,) from (rows, classes)."""
    return logits.double().softmax(1).amax(1)


@contextmanager
def _inference(model: MultiTaskModel) -> Iterator[None]:
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield
