"""The built-in tasks: heads, losses, metrics and checks, against formulas written out here."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import weft
from weft.errors import ConfigError, DataError, TaskError
from weft.tasks import KINDS, PooledLinear, pool, task_from_spec

TASKS = {
    "classification": weft.Classification(["ant", "bee", "cat"], smoothing=0.1),
    "zero": weft.Classification(3, head_init="zero"),
    "binary": weft.Binary(),
    "labels": weft.Binary(["red", "round"]),
    "regression": weft.Regression(),
    "l1": weft.Regression(2, loss="l1"),
    "segmentation": weft.Segmentation(3, ignore=9),
    "classification auc": weft.Classification(3, auc="per_batch", head_trains=False),
    "labels auc": weft.Binary(2, auc="per_batch"),
    "segmentation as published": weft.Segmentation(["sky", "sea"], variant="adashare", head="aspp"),
    "depth": weft.Depth(),
    "depth as published": weft.Depth(minimum=3e-5, variant="adashare", head="aspp"),
    "normals": weft.SurfaceNormals(),
    "normals as published": weft.SurfaceNormals(encoding="adashare", head="aspp"),
    "edges": weft.DenseRegression(invalid=255.0),
    "flow": weft.DenseRegression(2, head="aspp"),
}
# What bundles held before these kinds had more options, and what the new options are then.
EARLIER = [
    (
        {"kind": "classification", "classes": ["a", "b"], "smoothing": 0.1, "head_init": "zero"},
        {"head_trains": True, "auc": None},
    ),
    ({"kind": "binary", "labels": 3}, {"auc": "pooled"}),
    ({"kind": "regression", "targets": 2, "loss": "l1"}, {}),
    (
        {"kind": "segmentation", "classes": 4, "ignore": 9},
        {"variant": "standard", "head": "conv"},
    ),
]


def head(task: weft.Task, features: Tensor) -> nn.Module:
    """The task's head for such features."""
    make = task.head
    assert make is not None
    assert not isinstance(make, nn.Module)
    return make(features)


def measured(task: weft.Task, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The task's metrics over some batches."""
    metrics = copy.deepcopy(dict(task.metrics))
    for metric in metrics.values():
        metric.reset()
        for output, target in batches:
            metric.update(output, target)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


# ------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("shape", "axes"), [((4, 5), ()), ((4, 7, 5), (1,)), ((4, 5, 2, 3), (2, 3))]
)
def test_heads_pool_places(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    features = torch.randn(shape)
    pooled = features.mean(axes) if axes else features
    assert torch.equal(pool(features), pooled)
    made = head(weft.Classification(3), features)
    assert torch.allclose(made(features), F.linear(pooled, *made.linear.parameters()))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4, 5)])
def test_other_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match=r"2, 3 or 4 axes, found shape.*output=\.\.\.\), or give"):
        head(weft.Classification(3), torch.zeros(shape))


def test_heads_have_the_shapes_of_their_targets() -> None:
    x = torch.randn(4, 5)
    assert head(weft.Binary(), x)(x).shape == (4,)
    assert head(weft.Binary(3), x)(x).shape == (4, 3)
    assert head(weft.Regression(), x)(x).shape == (4,)
    assert head(weft.Regression(2), x)(x).shape == (4, 2)
    assert head(weft.Classification(3), x)(x).shape == (4, 3)
    assert not bool(head(weft.Classification(3, head_init="zero"), x)(x).any())
    maps = torch.randn(2, 5, 3, 3)
    assert head(weft.Segmentation(6), maps)(maps).shape == (2, 6, 3, 3)
    with pytest.raises(TaskError, match=r"reads a feature map \(rows, C, H, W\), but the base"):
        head(weft.Segmentation(6), x)


# ----------------------------------------------------------------------------------- losses


def test_classification_is_cross_entropy_of_any_integer_labels() -> None:
    logits, labels = torch.randn(6, 3), torch.randint(0, 3, (6,))
    expected = -F.log_softmax(logits, 1)[torch.arange(6), labels].mean()
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.allclose(weft.Classification(3).loss(logits, labels.to(dtype)), expected)
    smooth = 0.9 * expected - 0.1 * F.log_softmax(logits, 1).mean()
    assert torch.allclose(weft.Classification(3, smoothing=0.1).loss(logits, labels), smooth)


def test_binary_is_the_log_loss() -> None:
    logits = torch.tensor([0.3, -2.0, 40.0])
    for target in (torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.0, 1.0])):
        p = logits.double().sigmoid()
        expected = -(target * p.log() + (1 - target) * (1 - p).clamp(min=1e-300).log()).mean()
        assert float(weft.Binary().loss(logits, target)) == pytest.approx(float(expected))


def test_regression_losses() -> None:
    output, target = torch.tensor([1.0, 4.0]), torch.tensor([2, 2])
    assert float(weft.Regression().loss(output, target)) == 2.5
    assert float(weft.Regression(loss="l1").loss(output, target)) == 1.5


def test_segmentation_averages_over_labelled_pixels() -> None:
    task = weft.Segmentation(3, ignore=9)
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0] = 9
    expected = F.cross_entropy(logits[1:], labels[1:])
    assert torch.allclose(task.loss(logits, labels), expected)
    assert torch.allclose(task.loss(logits, labels.to(torch.uint8)), expected)
    assert float(task.loss(logits, torch.full((2, 4, 4), 9))) == 0.0
    small = torch.randn(2, 3, 2, 2)
    large = F.interpolate(small, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(task.loss(small, labels), task.loss(large, labels))


# ---------------------------------------------------------------------------------- metrics


def test_accuracy_counts_rows() -> None:
    logits = torch.eye(3)[[0, 1, 2, 2]]
    batches = ((logits, torch.tensor([0, 1, 2, 0])), (logits[:1], torch.tensor([1])))
    assert measured(weft.Classification(3), *batches) == {"accuracy": pytest.approx(3 / 5)}


def test_binary_metrics_agree_with_scikit_learn_however_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    # Logits in [0, 1] look like probabilities; large ones would saturate a sigmoid.
    logits = torch.cat([torch.rand(20, generator=generator), torch.linspace(-60, 60, 40)])
    target = torch.randint(0, 2, (60,), generator=generator)
    auc = roc_auc_score(target.numpy(), logits.numpy())
    accuracy = float(((logits > 0) == (target > 0)).float().mean())
    for size in (60, 20, 7):
        found = measured(
            weft.Binary(), *zip(logits.split(size), target.float().split(size), strict=True)
        )
        assert found["auc"] == pytest.approx(auc, abs=1e-6)
        assert found["accuracy"] == pytest.approx(accuracy)


def test_multi_label_accuracy_counts_labels() -> None:
    logits, target = torch.tensor([[1.0, -1.0], [2.0, 2.0]]), torch.tensor([[1, 0], [1, 0]])
    assert measured(weft.Binary(2, auc=None), (logits, target)) == {"accuracy": 0.75}


def test_regression_metrics_pool_over_batches() -> None:
    batches = (
        (torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0])),
        (torch.tensor([0.0]), torch.tensor([3.0])),
    )
    found = measured(weft.Regression(), *batches)
    assert found == {"mse": pytest.approx(14 / 3), "mae": pytest.approx(2.0)}
    assert list(found) == ["mse", "mae"]
    assert list(measured(weft.Regression(loss="l1"), *batches)) == ["mae", "mse"]
    pair = (torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]]))
    assert measured(weft.Regression(2), pair)["mse"] == pytest.approx(2.5)
    assert not any(m.higher_is_better for m in weft.Regression().metrics.values())


def test_segmentation_metrics_by_hand() -> None:
    predicted = torch.tensor([[[0, 0], [1, 1]]])
    labels = torch.tensor([[[0, 1], [1, 9]]])
    logits = F.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    found = measured(weft.Segmentation(3, ignore=9), (logits, labels))
    # Class 0: one hit in a union of two; class 1: one hit in a union of two; class 2 is absent.
    assert found == {"miou": pytest.approx(0.5), "pixel_accuracy": pytest.approx(2 / 3)}


# ----------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("name", "output", "target", "complaint"),
    [
        ("classification", (2, 3), torch.tensor([0, 3]), r"found 0\.\.3, expected 0\.\.2"),
        ("classification", (2, 3), torch.tensor([-1, 2]), r"found -1\.\.2, expected 0\.\.2"),
        ("classification", (2, 3), torch.tensor([0.0, 1.0]), r"integers 0\.\.2, found torch.flo"),
        ("classification", (2, 3), torch.tensor([1]), "Found 1 labels for 2 rows"),
        ("classification", (2, 3), torch.zeros(2, 3).long(), "Use indices, not one-hot vectors"),
        ("binary", (2,), torch.tensor([0, 2]), r"0 or 1, found 0\.0\.\.2\.0"),
        ("binary", (2,), torch.tensor([[0], [1]]), r"shape of the logits \(2,\), found \(2, 1\)"),
        ("labels", (2, 2), torch.tensor([0, 1]), r"\(2, 2\), found \(2,\)"),
        ("regression", (2,), torch.tensor([[0.0], [1.0]]), r"outputs \(2,\), found \(2, 1\)"),
        ("regression", (2,), torch.tensor([0.0, float("nan")]), "contain NaN or infinity"),
        ("segmentation", (1, 3, 2, 2), torch.full((1, 2, 2), 7), r"found 7\.\.7, expected 0\.\.2"),
    ],
)
def test_wrong_targets_are_refused(
    name: str, output: tuple[int, ...], target: Tensor, complaint: str
) -> None:
    check = TASKS[name].check
    assert check is not None
    with pytest.raises(DataError, match=complaint):
        check(torch.zeros(output), target)


@pytest.mark.parametrize(
    ("name", "output", "target"),
    [
        ("classification", (2, 3), torch.tensor([0, 2])),
        ("binary", (2,), torch.tensor([0.0, 1.0])),
        ("labels", (2, 2), torch.tensor([[0, 1], [1, 1]])),
        ("l1", (1, 2), torch.tensor([[0.5, -3.0]])),
        ("segmentation", (1, 3, 2, 2), torch.tensor([[[0, 9], [2, 1]]])),
        ("segmentation", (1, 3, 2, 2), torch.full((1, 4, 4), 9)),
    ],
)
def test_right_targets_pass(name: str, output: tuple[int, ...], target: Tensor) -> None:
    check = TASKS[name].check
    assert check is not None
    check(torch.zeros(output), target)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: weft.Classification(1), "at least 2 classes or labels, found 1"),
        (lambda: weft.Classification(["a", "b", "a"]), "repeat: a, b, a"),
        (lambda: weft.Binary(0), "at least 1"),
        (lambda: weft.Regression(0), "at least 1 target, found 0"),
        (lambda: weft.Regression(loss="huber"), "'mse' or 'l1', found 'huber'"),
        (lambda: weft.Classification(3, smoothing=1.0), r"in \[0, 1\), found 1.0"),
        (lambda: weft.Classification(3, head_init="ones"), "'default' or 'zero', found 'ones'"),
        (lambda: weft.Classification(3, head_init="zero", head_trains=False), "no gradient"),
        (lambda: weft.Binary(auc="pooling"), "found 'pooling'. Close matches: pooled"),
        (lambda: weft.Segmentation(3, variant="adshare"), "Close matches: adashare"),
        (lambda: weft.Depth(minimum=-1.0), "a number >= 0, found -1.0"),
        (lambda: weft.Depth(minimum=float("nan")), "a number >= 0, found nan"),
        (lambda: weft.Depth(head="asp"), "'conv' or 'aspp', found 'asp'. Close matches: aspp"),
        (lambda: weft.DenseRegression(0), "at least 1 channel, found 0"),
        (lambda: weft.SurfaceNormals(encoding="raw"), "'decoded' or 'adashare', found 'raw'"),
    ],
)
def test_wrong_options_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()


# ------------------------------------------------------------------------------ description


@pytest.mark.parametrize("name", TASKS)
def test_tasks_come_back_from_their_description_and_from_pickle(name: str) -> None:
    task = TASKS[name]
    assert task.spec is not None
    again = task_from_spec(task.spec)
    assert again.spec == task.spec
    assert again.classes == task.classes
    assert again.loss == task.loss
    assert again.check == task.check
    assert again.head == task.head
    assert list(again.metrics) == list(task.metrics)
    copied = pickle.loads(pickle.dumps(task))
    assert copied.spec == task.spec
    assert copied.head == task.head


@pytest.mark.parametrize(("spec", "added"), EARLIER)
def test_earlier_descriptions_mean_what_they_meant(
    spec: dict[str, Any], added: dict[str, Any]
) -> None:
    assert task_from_spec(spec).spec == {**spec, **added}


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"kind": "clasification", "classes": 3}, "Close matches: classification"),
        ({}, "no kind of task None. Kinds: classification, binary, regression, segmentation"),
        ({"kind": "regression", "clases": 3}, "Task of kind 'regression':.*'clases'"),
        ({"kind": "classification", "smothing": 0.1}, "'smothing'. Close matches: smoothing"),
        ({"kind": "surface_normals", "size": 3}, "'size'. Options: encoding, head"),
        ({"kind": "normals"}, "Close matches: surface_normals"),
        ({"kind": "classification"}, "Task of kind 'classification':.*missing.*'classes'"),
    ],
)
def test_wrong_descriptions_are_refused(spec: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        task_from_spec(spec)


def test_kinds_are_the_built_in_tasks() -> None:
    assert {TASKS[name].spec["kind"] for name in TASKS} == set(KINDS)  # type: ignore[index]


def test_metrics_of_ones_own_go_by_their_class() -> None:
    class MyMeanError:
        def update(self, *_: Any) -> None: ...

        def compute(self) -> float:
            return 0.0

        def reset(self) -> None: ...

    task = weft.Task(head=None, loss=F.mse_loss, metric=MyMeanError())
    assert list(task.metrics) == ["my_mean_error"]
    assert not weft.Task(head=None, loss=F.mse_loss).metrics


def test_a_squeezed_head_drops_the_last_axis() -> None:
    assert PooledLinear(5, 1, squeeze=True)(torch.randn(3, 5)).shape == (3,)
