"""evaluate: right scores, and nothing changed."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_nets import (
    assert_same_bits,
    conv_net,
    dense_net,
    everything,
    images,
    in_order,
    model_of,
    shuffled,
    vectors,
)

import weft
from weft.errors import DataError, TaskError


class Rows:
    """A metric of one's own without torchmetrics: how many rows it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        assert not output.requires_grad
        self.seen += len(target)

    def compute(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.seen = 0


class PerClass(Rows):
    def compute(self) -> Any:
        return torch.tensor([0.5, 0.5])


class Infinite(Rows):
    def compute(self) -> Any:
        return math.inf


class Absent(Rows):
    def compute(self) -> Any:
        return math.nan


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training: bool) -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base))
    model.train(training)
    model.tasks["a"].head.train(not training)
    before, modes = everything(model), [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    data = {t: shuffled(images(24, 3, 1)) for t in "ab"}
    first, second = weft.evaluate(model, data), weft.evaluate(model, data)
    assert first == second
    assert_same_bits(everything(model), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert model.tasks["a"].task.metrics["accuracy"].update_count == 0


def test_modes_come_back_after_an_error() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base))
    model.train()
    with pytest.raises(DataError, match="Task 'a': Labels are outside the classes: found 7"):
        weft.evaluate(model, {"a": [(torch.randn(4, 3, 6, 6), torch.full((4,), 7))]})
    assert all(m.training for m in model.modules())


def test_scores_are_over_all_rows_whatever_the_batches() -> None:
    base = dense_net().double()
    model = model_of(base, weft.full_finetune(base))
    data = vectors(41, 3, 1, torch.float64)
    x, y = data.tensors
    model.eval()
    output = model(x, task="a").detach()
    expected = {
        "accuracy": float((output.argmax(1) == y).double().mean()),
        "loss": float(nn.functional.cross_entropy(output, y)),
    }
    for size in (1, 4, 41):
        scores = weft.evaluate(model, {"a": DataLoader(data, batch_size=size)})["a"]
        assert list(scores) == ["accuracy", "loss"]
        assert scores == pytest.approx(expected, rel=1e-6)


def test_own_metrics_are_copied_reset_and_ordered() -> None:
    metric = Rows()
    metric.seen = 1000
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    auc = torchmetrics.classification.MulticlassAUROC(3)
    task = weft.Task(nn.Linear(8, 3), nn.functional.cross_entropy, {"rows": metric, "auc": auc})
    model.add_task("a", task)
    scores = weft.evaluate(model, {"a": in_order(vectors(24, 3, 1))})["a"]
    assert list(scores) == ["rows", "auc", "loss"]
    assert scores["rows"] == 24.0
    assert metric.seen == 1000


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (PerClass(), TaskError, "Metric 'per_class' of 'a' computes one number, found Tensor"),
        (Infinite(), DataError, "Metric 'infinite' of 'a' is infinite"),
    ],
)
def test_metrics_that_are_no_number_are_refused(
    metric: Any, error: type[Exception], message: str
) -> None:
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(nn.Linear(8, 3), nn.functional.cross_entropy, metric))
    with pytest.raises(error, match=message):
        weft.evaluate(model, {"a": in_order(vectors(16, 3, 1))})


def test_a_metric_may_be_absent() -> None:
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(nn.Linear(8, 3), nn.functional.cross_entropy, Absent()))
    scores = weft.evaluate(model, {"a": in_order(vectors(16, 3, 1))})["a"]
    assert math.isnan(scores["absent"])


def test_dicts_and_tuples_of_inputs_are_counted_by_rows() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) + y

    base = Pair()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(nn.Linear(8, 3), nn.functional.cross_entropy, Rows()))
    x, y, target = torch.randn(6, 5), torch.randn(6, 8), torch.randint(3, (6,))
    by_name = [{"x": x, "y": y, "labels": target}]
    by_place = [((x, y), target)]
    by_mapping = [({"x": x, "y": y}, target)]
    scores = [weft.evaluate(model, {"a": d}) for d in (by_name, by_place, by_mapping)]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["a"]["rows"] == 6.0


def test_wrong_tasks_and_data_are_refused() -> None:
    base = dense_net()
    model = model_of(base, weft.linear_probe(base))
    with pytest.raises(TaskError, match="Close matches: a"):
        weft.evaluate(model, {"aa": in_order(vectors(16, 3, 1))})
    with pytest.raises(DataError, match="The data of 'a' is empty"):
        weft.evaluate(model, {"a": []})
    with pytest.raises(DataError, match=r"A batch of 'a' is a pair .* found list of 3"):
        weft.evaluate(model, {"a": [[1, 2, 3]]})
    with pytest.raises(DataError, match=r"found dict with 'x'"):
        weft.evaluate(model, {"a": [{"x": torch.zeros(2, 5)}]})
    with pytest.raises(DataError, match="found Tensor"):
        weft.evaluate(model, {"a": [torch.zeros(2, 5)]})


def test_a_task_without_a_head_yet_is_refused() -> None:
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Classification(3))
    with pytest.raises(TaskError, match="head of 'a' is not built yet"):
        weft.evaluate(model, {"a": in_order(vectors(16, 3, 1))})
