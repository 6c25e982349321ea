"""Areas under ROC curves, against scikit-learn: pooled, per batch, of labels and of classes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import weft


def auc(task: weft.Task, *batches: tuple[Tensor, Tensor]) -> float:
    """The task's area over some batches."""
    metric = copy.deepcopy(task.metrics["auc"])
    metric.reset()
    for output, target in batches:
        metric.update(output, target)
    return float(metric.compute())


def split(output: Tensor, target: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of so many rows."""
    return list(zip(output.split(size), target.split(size), strict=True))


def labels(rows: int = 60, count: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and 0/1 targets that they tell something about."""
    target = (torch.rand(rows, count) < torch.linspace(0.2, 0.7, count)).float()
    return torch.randn(rows, count) + target, target


def kinds(rows: int = 60, count: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and classes that they tell something about; each class in every 12 rows."""
    target = torch.arange(rows) % count
    return 2 * torch.randn(rows, count) + torch.eye(count)[target], target


def test_pooled_area_of_labels_is_their_mean_however_batched() -> None:
    logits, target = labels()
    expected = roc_auc_score(target.numpy(), logits.numpy(), average="macro")
    for size in (60, 7, 1):
        found = auc(weft.Binary(4), *split(logits, target, size))
        assert found == pytest.approx(expected, abs=1e-6)


def test_pooled_area_of_classes_is_each_against_the_rest_however_batched() -> None:
    logits, target = kinds()
    expected = roc_auc_score(target.numpy(), logits.softmax(1).numpy(), multi_class="ovr")
    for size in (60, 7, 1):
        found = auc(weft.Classification(4, auc="pooled"), *split(logits, target, size))
        assert found == pytest.approx(expected, abs=1e-6)


def test_area_per_batch_of_labels_is_that_of_all_labels_as_one_averaged_by_rows() -> None:
    logits, target = labels()
    parts = split(logits, target, 25)
    areas = [roc_auc_score(y.flatten().numpy(), x.flatten().numpy()) for x, y in parts]
    expected = np.average(areas, weights=[len(y) for _, y in parts])
    assert auc(weft.Binary(4, auc="per_batch"), *parts) == pytest.approx(expected, abs=1e-6)


def test_area_per_batch_of_classes_is_that_of_pairs_averaged_by_rows() -> None:
    logits, target = kinds()
    parts = split(logits, target, 25)
    areas = [
        roc_auc_score(y.numpy(), x.double().softmax(1).numpy(), multi_class="ovo") for x, y in parts
    ]
    expected = np.average(areas, weights=[len(y) for _, y in parts])
    task = weft.Classification(4, auc="per_batch")
    assert auc(task, *parts) == pytest.approx(expected, abs=1e-6)


def test_batches_that_are_ranked_apart_are_perfect_per_batch_and_not_pooled() -> None:
    high = torch.tensor([10.0, 9.0]), torch.tensor([1, 0])
    low = torch.tensor([1.0, 0.0]), torch.tensor([1, 0])
    assert auc(weft.Binary(auc="per_batch"), high, low) == 1.0
    # Of four pairs of a positive and a negative only (1, 9) is in the wrong order.
    assert auc(weft.Binary(), high, low) == pytest.approx(3 / 4)


def test_only_the_order_of_logits_matters() -> None:
    logits, target = labels(count=1)
    logits, target = logits[:, 0], target[:, 0]
    expected = auc(weft.Binary(), (logits, target))
    assert 0.5 < expected < 1.0
    for changed in (100 * logits, logits / 100 + 0.5, logits**3):
        assert auc(weft.Binary(), (changed, target)) == pytest.approx(expected, abs=1e-7)


def test_the_smallest_differences_and_infinity_keep_their_order() -> None:
    tiny = torch.tensor([0.0, 1e-300, 2e-300, math.inf], dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 1])
    assert auc(weft.Binary(), (tiny, target)) == 1.0
    assert auc(weft.Binary(), (-tiny, target)) == 0.0


def test_what_is_no_number_has_no_area() -> None:
    logits = torch.tensor([0.0, math.nan, 1.0])
    assert math.isnan(auc(weft.Binary(), (logits, torch.tensor([0, 1, 1]))))


def test_confident_classes_keep_their_order() -> None:
    # In single precision both probabilities of class 0 would be rounded to one.
    logits, target = torch.tensor([[30.0, 0.0], [20.0, 0.0]]), torch.tensor([0, 1])
    assert auc(weft.Classification(2, auc="pooled"), (logits, target)) == 1.0


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_labels_that_never_change_are_left_out(constant: float) -> None:
    logits, target = labels()
    target[:, 2] = constant
    kept = [0, 1, 3]
    expected = roc_auc_score(target[:, kept].numpy(), logits[:, kept].numpy())
    assert auc(weft.Binary(4), (logits, target)) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(auc(weft.Binary(), (logits[:, 2], target[:, 2])))


def test_classes_that_do_not_occur_are_left_out() -> None:
    logits, target = kinds()
    keep = target != 2
    logits, target = logits[keep], target[keep]
    p = logits.double().softmax(1).numpy()
    expected = np.mean([roc_auc_score((target == c).numpy(), p[:, c]) for c in (0, 1, 3)])
    found = auc(weft.Classification(4, auc="pooled"), (logits, target))
    assert found == pytest.approx(expected, abs=1e-6)


def test_batches_of_one_class_are_left_out_of_the_mean_of_batches() -> None:
    logits, target = labels(count=1)
    whole = logits[:, 0], target[:, 0]
    alone = auc(weft.Binary(auc="per_batch"), whole)
    single = torch.randn(5), torch.ones(5)
    assert auc(weft.Binary(auc="per_batch"), whole, single) == pytest.approx(alone)
    assert math.isnan(auc(weft.Binary(auc="per_batch"), single))


def test_the_area_of_classes_is_measured_where_asked_for() -> None:
    assert list(weft.Classification(3).metrics) == ["accuracy"]
    assert list(weft.Classification(3, auc="pooled").metrics) == ["accuracy", "auc"]
    assert list(weft.Binary(3).metrics) == ["accuracy", "auc"]
    assert list(weft.Binary(auc=None).metrics) == ["accuracy"]
