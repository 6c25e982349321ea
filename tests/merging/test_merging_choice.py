"""How the scale is chosen on validation data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import batches, data, make_base, model_of

import weft
from weft.errors import DataError
from weft.merging import merge

NAN = float("nan")


def test_a_scale_is_chosen_on_validation_with_the_baseline_beside_it() -> None:
    model = model_of()
    found = merge(model, how="ties", scale="choose", data=data(model), scales=[0.2, 0.6, 1.0])
    means = {s: np.mean(list(tasks.values())) for s, tasks in found.scores.items()}
    assert set(means) == {0.2, 0.6, 1.0}
    assert means[found.scale] == max(means.values())
    assert set(found.baseline) == set(means)
    scores = weft.evaluate(found.model, data(model))
    assert {t: v["accuracy"] for t, v in scores.items()} == found.scores[found.scale]
    plain = merge(model, data=data(model), scales=[0.1, 0.2])
    assert plain.baseline == {}
    if plain.scale == 0.2:
        assert "try larger" in plain.warnings[0]


def regressions(*kinds: str) -> weft.MultiTaskModel:
    """Tasks whose first metric is an error; "c" is one of classification."""
    base = make_base()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 6))
    for i, kind in enumerate(kinds):
        task = weft.Classification(3) if kind == "c" else weft.Regression(2)
        model.add_task(f"t{i}", task)
        with torch.no_grad():
            for tensor in model.tasks[f"t{i}"].own.values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("how", ["task_arithmetic", "ties"])
def test_where_smaller_is_better_the_smallest_error_wins(how: Any) -> None:
    model = regressions("r", "r")
    wanted = merge(model, how=how, scale=0.6).model
    with torch.no_grad():
        val = {
            t: [(x, wanted(x, task=t)) for x, _ in batches(i)]
            for i, t in enumerate(model.task_names)
        }
    found = merge(model, how=how, scale="choose", data=val, scales=[0.2, 0.6, 1.0])
    assert found.scale == 0.6
    assert max(found.scores[0.6].values()) < 1e-6
    assert found.means[0.2] == pytest.approx(-np.mean(list(found.scores[0.2].values())))
    if how == "ties":
        assert not any("Task arithmetic" in warning for warning in found.warnings)


def scored(
    monkeypatch: pytest.MonkeyPatch, *scores: Mapping[str, Mapping[str, float]]
) -> list[float]:
    """Let candidates have these scores, one after the other; gives the candidates."""
    left = iter(scores)
    monkeypatch.setattr("weft.merging.choosing.evaluate", lambda *_: next(left))
    return [0.1 * (i + 1) for i in range(len(scores))]


def accuracies(*values: float) -> Mapping[str, Mapping[str, float]]:
    return {f"t{i}": {"accuracy": v, "loss": 1.0} for i, v in enumerate(values)}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_worst_wherever_it_stands(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    model = model_of(2)
    tried = [accuracies(0.2, 0.3), accuracies(0.4, 0.3)]
    tried.insert(place, accuracies(0.9, NAN))
    scales = scored(monkeypatch, *tried)
    found = merge(model, scale="choose", data=data(model), scales=scales)
    assert found.scale == scales[tried.index(accuracies(0.4, 0.3))]
    assert found.means[scales[place]] == -float("inf")


def test_nan_everywhere_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(2)
    scales = scored(monkeypatch, accuracies(0.9, NAN), accuracies(NAN, 0.3))
    with pytest.raises(DataError, match=r"No scale can be chosen: at each of 0.1, 0.2"):
        merge(model, scale="choose", data=data(model), scales=scales)


def test_a_baseline_of_nan_is_not_better(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(2)
    scored(monkeypatch, accuracies(0.4, 0.3), accuracies(NAN, 0.3))
    found = merge(model, how="ties", scale="choose", data=data(model), scales=[0.5])
    assert found.warnings == ()
    assert found.baseline_means == {0.5: -float("inf")}


def test_where_metrics_differ_the_least_sum_of_losses_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = regressions("c", "r")
    scales = scored(
        monkeypatch,
        # The mean of accuracy and of the negative error is best here,
        {"t0": {"accuracy": 0.9, "loss": 5.0}, "t1": {"mse": 1.0, "mae": 1.0, "loss": 1.0}},
        # the sum of losses here.
        {"t0": {"accuracy": 0.1, "loss": 0.1}, "t1": {"mse": 1.5, "mae": 1.0, "loss": 1.5}},
        {"t0": {"accuracy": 0.1, "loss": 3.0}, "t1": {"mse": 1.2, "mae": 1.0, "loss": 1.2}},
    )
    found = merge(model, scale="choose", data={"t0": [], "t1": []}, scales=scales)
    assert found.scale == scales[1]
    assert list(found.means.values()) == pytest.approx([-3.0, -0.8, -2.1])
    assert found.scores[scales[0]] == {"t0": 0.9, "t1": 1.0}
    assert "least sum of losses" in found.warnings[0]
    assert "accuracy, mse" in found.warnings[0]


def test_losses_are_those_of_the_candidates() -> None:
    model = regressions("c", "r")
    val: dict[str, Any] = {
        "t0": batches(0),
        "t1": [(x, torch.stack([y, -y], 1).float()) for x, y in batches(1)],
    }
    scales = [0.1, 0.5, 1.0]
    found = merge(model, scale="choose", data=val, scales=scales)
    for scale in scales:
        scores = weft.evaluate(merge(model, scale=scale).model, val)
        losses = [values["loss"] for values in scores.values()]
        assert found.means[scale] == pytest.approx(-np.mean(losses))
    assert found.means[found.scale] == max(found.means.values())


def test_data_that_can_be_read_only_once_is_refused() -> None:
    model = model_of(2)
    once = {task: iter(rows) for task, rows in data(model).items()}
    with pytest.raises(DataError, match=r"'t0' is an object of type list_iterator.*only once"):
        merge(model, scale="choose", data=once)
    merge(model, scale=0.3, data=once)  # nothing is read
