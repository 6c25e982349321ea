"""The mean relative improvement over references, by numbers made by hand."""

from __future__ import annotations

import math

import pytest

import weft
from weft.errors import ConfigError, DataError
from weft.tasks import KINDS
from weft.tasks.relative import HIGHER, LOWER

REFERENCE = {
    "seg": {"miou": 0.4, "pixel_accuracy": 0.5},
    "depth": {"abs_error": 0.02},
}


def test_metrics_average_within_a_task_and_then_tasks_average() -> None:
    scores = {"seg": {"miou": 0.5, "pixel_accuracy": 0.45}, "depth": {"abs_error": 0.016}}
    # seg: (+25 % - 10 %) / 2; depth: +20 %, less being better.
    assert weft.relative_improvement(scores, REFERENCE) == pytest.approx((7.5 + 20) / 2)


def test_a_published_row_gives_its_published_number() -> None:
    # DiSparse's table of NYU v2: its dynamic network against the dense one, +1.52.
    names = ("mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30")
    dense = {
        "seg": {"miou": 27.69, "pixel_accuracy": 58.77},
        "normals": dict(zip(names, (16.55, 14.17, 39.62, 73.54, 86.33), strict=True)),
    }
    dynamic = {
        "seg": {"miou": 28.16, "pixel_accuracy": 59.18},
        "normals": dict(zip(names, (16.54, 13.47, 42.25, 73.14, 84.73), strict=True)),
    }
    assert weft.relative_improvement(dynamic, dense) == pytest.approx(1.52, abs=0.005)


def test_the_reference_itself_is_zero() -> None:
    assert weft.relative_improvement(REFERENCE, REFERENCE) == 0.0


def test_units_do_not_matter() -> None:
    scores = {"a": {"mae": 1.5, "accuracy": 0.9}}
    reference = {"a": {"mae": 2.0, "accuracy": 0.8}}
    scaled = [
        {"a": {"mae": 1000 * t["a"]["mae"], "accuracy": 100 * t["a"]["accuracy"]}}
        for t in (scores, reference)
    ]
    expected = weft.relative_improvement(scores, reference)
    assert expected == pytest.approx((25 + 12.5) / 2)
    assert weft.relative_improvement(*scaled) == pytest.approx(expected)


def test_the_reference_says_which_metrics_count_and_the_loss_never_does() -> None:
    scores = {"a": {"accuracy": 0.9, "auc": 0.1, "loss": 7.0}}
    reference = {"a": {"accuracy": 0.6, "loss": 1.0}}
    assert weft.relative_improvement(scores, reference) == pytest.approx(50)


def test_metrics_of_ones_own_need_a_direction() -> None:
    scores, reference = {"a": {"rmse": 1.0}}, {"a": {"rmse": 2.0}}
    for lower, expected in ((True, 50.0), (False, -50.0)):
        found = weft.relative_improvement(scores, reference, lower_is_better={"rmse": lower})
        assert found == pytest.approx(expected)
    with pytest.raises(ConfigError, match=r"Is less of 'rmse' \(of 'a'\) better.*matches: mse"):
        weft.relative_improvement(scores, reference)


@pytest.mark.parametrize(
    ("scores", "reference", "complaint"),
    [
        ({"a": {"mae": 1.0}}, {"b": {"mae": 1.0}}, "are of a, the reference of b"),
        ({}, {}, "no task"),
        ({"a": {"mse": 1.0}}, {"a": {"mae": 1.0}}, "no score 'mae'.*Close matches: mse"),
        ({"a": {"mae": math.nan}}, {"a": {"mae": 1.0}}, "'mae' of 'a' is nan against 1.0"),
        ({"a": {"mae": 1.0}}, {"a": {"mae": 0.0}}, "against a reference above zero"),
        ({"a": {"mae": 1.0}}, {"a": {"mae": -1.0}}, "against a reference above zero"),
        ({"a": {"mae": 1.0}}, {"a": {"loss": 1.0}}, "The reference of 'a' has no metric"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(
    scores: dict[str, dict[str, float]], reference: dict[str, dict[str, float]], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        weft.relative_improvement(scores, reference)


def test_directions_are_those_of_the_metrics_of_all_built_in_tasks() -> None:
    needed = {"classification": {"classes": 3, "auc": "pooled"}, "segmentation": {"classes": 3}}
    found: dict[str, set[object]] = {}
    for kind, make in KINDS.items():
        for name, metric in make(**needed.get(kind, {})).metrics.items():
            found.setdefault(name, set()).add(metric.higher_is_better)  # type: ignore[attr-defined]
    assert {name for name, higher in found.items() if higher == {True}} == HIGHER
    assert {name for name, higher in found.items() if higher == {False}} == LOWER
    assert len(found) == len(HIGHER | LOWER)
