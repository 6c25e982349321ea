"""Plans from tables: seeds, budgets, objectives, single methods, curves."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from weft.errors import ConfigError, DataError, PlanError
from weft.planning import plan, plan_curve
from weft.tasks import relative_improvement


def row(task: str, label: str, val: float | None, size: int, **more: Any) -> dict[str, Any]:
    """A row of a comparison's table."""
    values = {
        "task": task,
        "label": label,
        "method": label,
        "options": "{}",
        "train": "{}",
        "seed": 0,
        "metric": "accuracy",
        "higher_is_better": True,
        "val": val,
        "test": None if val is None else val - 0.05,
        "own_bytes": size,
        "head_bytes": 10,
        "shared_bytes": 0,
        "base_bytes": 1000,
        **more,
    }
    return {"cell": f"{task}-{label}-{values['seed']}", **values}


@pytest.fixture
def frame() -> pd.DataFrame:
    """Three tasks under a small method, a large one, and one for all of them together."""
    rows = []
    for task, small, large, joint in (("a", 0.5, 0.9, 0.7), ("b", 0.8, 0.82, 0.7),
                                      ("c", 0.6, 0.7, 0.7)):  # fmt: skip
        rows += [
            row(task, "small", small, 100),
            row(task, "large", large, 1000),
            row(task, "joint", joint, 10, shared_bytes=900, cell="joint-0"),
        ]
    return pd.DataFrame(rows)


def labels(made: Any) -> dict[str, str]:
    return {task: line["method"] for task, line in made.to_dict()["tasks"].items()}


def test_a_plan_mixes_methods_and_reports_test(frame: pd.DataFrame) -> None:
    made = plan(frame, 1200)
    assert labels(made) == {"a": "large", "b": "small", "c": "small"}
    assert made.chosen.bytes == 1200
    assert made.chosen.val[0] == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert made.chosen.test is not None
    assert made.chosen.test[0] == pytest.approx((0.9 + 0.8 + 0.6) / 3 - 0.05)
    assert made.best_single is not None
    assert (made.best_single.name, made.best_single.bytes) == ("joint", 930)
    assert [s.name for s in made.singles] == ["large", "joint", "small"]


def test_what_is_shared_counts_once_and_joint_cells_are_whole(frame: pd.DataFrame) -> None:
    made = plan(frame, 930)
    assert labels(made) == dict.fromkeys("abc", "joint")
    assert made.chosen.bytes == 930
    assert labels(plan(frame, 929)) == dict.fromkeys("abc", "small")
    assert made.to_dict()["tasks"]["a"]["together_with"] == ["b", "c"]


def test_budgets_in_bytes_sizes_and_times_the_base(frame: pd.DataFrame) -> None:
    assert plan(frame, "1.2KB").budget == 1200
    assert plan(frame, "2.2x").budget == 1200  # with the base of 1000 bytes: 2200
    assert plan(frame, "1.5 x").budget == 500
    for little in ("1.2x", "1x", "0B", 0):
        with pytest.raises(PlanError, match=r"least that covers every task takes 300 bytes, or 1"):
            plan(frame, little)
    for wrong, said in (("0.9x", "at least 1x"), ("many", "1.5x"), (-1, "at least 0")):
        with pytest.raises(ConfigError, match=said):
            plan(frame, wrong)


def test_the_least_that_is_named_would_do() -> None:
    frame = pd.DataFrame([row("a", "bias", 0.9, 1_234_567, base_bytes=10_000_000)])
    with pytest.raises(PlanError, match=r"or 1\.124x") as refused:
        plan(frame, "1x")
    named = str(refused.value).rpartition("or ")[2].split("x")[0]
    assert plan(frame, f"{named}x").chosen.bytes == 1_234_567
    frame = pd.DataFrame([row("a", "bias", 0.9, 150)])
    assert plan(frame, "1.15x").budget == 150  # as a float, 0.15 times 1000 is 149.99...


def test_the_order_of_a_table_does_not_matter(frame: pd.DataFrame) -> None:
    two = pd.concat([frame, frame.assign(seed=1, cell=frame["cell"] + "-1")])
    mixed = two.sample(frac=1.0, random_state=3)
    for budget in (300, 930, 1200):
        assert labels(plan(mixed, budget)) == labels(plan(two, budget))


def test_heads_count_where_asked(frame: pd.DataFrame) -> None:
    assert plan(frame, 1230, heads=True).chosen.bytes == 1230
    assert labels(plan(frame, 1229, heads=True)) == dict.fromkeys("abc", "joint")


def test_the_worst_and_weighted_objectives(frame: pd.DataFrame) -> None:
    assert labels(plan(frame, 1200, objective="worst")) == dict.fromkeys("abc", "joint")
    weighted = plan(frame, 1200, weights={"b": 50.0})
    assert labels(weighted)["b"] == "large"
    with pytest.raises(ConfigError, match="no task 'd'"):
        plan(frame, 1200, weights={"d": 1.0})
    with pytest.raises(ConfigError, match="weights belong to the mean"):
        plan(frame, 1200, objective="worst", weights={"a": 1.0})
    with pytest.raises(ConfigError, match="expected a number >= 0"):
        plan(frame, 1200, weights={"a": -1.0})


def test_scores_are_means_over_seeds_and_bytes_the_largest() -> None:
    frame = pd.DataFrame(
        [
            row("a", "small", 0.6, 100, seed=0),
            row("a", "small", 0.8, 120, seed=1),
            row("a", "large", 0.75, 500, seed=0),
            row("a", "large", 0.75, 400, seed=1),
            row("a", "half", 0.99, 10, seed=0),
        ]
    )
    made = plan(frame, 10_000)
    assert labels(made) == {"a": "large"}
    assert made.chosen.bytes == 500
    cheap = plan(frame, 499)
    line = cheap.to_dict()["tasks"]["a"]
    assert (line["method"], line["val"]) == ("small", pytest.approx(0.7))
    assert cheap.chosen.val[1] == pytest.approx(0.1414, abs=1e-4)
    assert (line["seed"], line["seed_val"], line["cell"]) == (1, 0.8, "a-small-1")
    assert made.to_dict()["left_out"] == {"half for a": "no result for seed 1"}
    assert labels(plan(frame, 10_000, max_seeds=1)) == {"a": "half"}


def test_smaller_is_better_where_the_metric_says_so() -> None:
    frame = pd.DataFrame(
        [
            row("a", "small", 3.0, 10, metric="mse", higher_is_better=False),
            row("a", "large", 1.0, 90, metric="mse", higher_is_better=False),
        ]
    )
    made = plan(frame, 100)
    assert labels(made) == {"a": "large"}
    assert made.chosen.val[0] == 1.0
    assert [s.name for s in made.singles] == ["large", "small"]


def test_different_metrics_need_weights(frame: pd.DataFrame) -> None:
    mixed = pd.concat([frame, pd.DataFrame([row("d", "small", 0.3, 5, metric="f1")])])
    with pytest.raises(ConfigError, match="different metrics, accuracy, f1"):
        plan(mixed, 5000)
    assert plan(mixed, 5000, weights=dict.fromkeys("abcd", 1.0)).chosen.bytes <= 5000


@pytest.fixture
def mixed() -> pd.DataFrame:
    """An accuracy beside an error, each by a small, a large and a reference method."""
    rows = []
    for seed, shift in ((0, 0.0), (1, 0.02)):
        for label, accuracy, error, size in (
            ("reference", 0.8, 2.0, 1000), ("small", 0.6, 1.9, 10), ("large", 0.9, 1.0, 600),
        ):  # fmt: skip
            rows += [
                row("a", label, accuracy + shift, size, seed=seed),
                row("b", label, error - shift, size, seed=seed, metric="mse",
                    higher_is_better=False),
            ]  # fmt: skip
    return pd.DataFrame(rows)


def test_mixed_directions_are_planned_as_improvements_over_a_method(mixed: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match=r"no sum means anything.*--relative-to full_finetune"):
        plan(mixed, 2000, weights={"a": 1.0, "b": 1.0})
    made = plan(mixed, 2000, relative_to="reference")
    assert labels(made) == {"a": "large", "b": "large"}
    reference = {"a": {"accuracy": 0.81}, "b": {"mse": 1.99}}
    for label in ("small", "large"):
        single = next(s for s in made.singles if s.name == label)
        means = mixed[mixed["label"] == label].groupby("task")["val"].mean()
        scores = {"a": {"accuracy": means["a"]}, "b": {"mse": means["b"]}}
        assert single.val[0] == pytest.approx(relative_improvement(scores, reference))
    assert next(s for s in made.singles if s.name == "reference").val[0] == pytest.approx(0.0)
    assert [s.name for s in made.singles] == ["large", "reference", "small"]
    one = plan(mixed, 610, relative_to="reference")  # the error halves: more than a tenth
    assert labels(one) == {"a": "small", "b": "large"}
    weighted = plan(mixed, 610, relative_to="reference", weights={"a": 5.0, "b": 1.0})
    assert labels(weighted) == {"a": "large", "b": "small"}
    worst = plan(mixed, 610, relative_to="reference", objective="worst")
    assert labels(worst) == {"a": "large", "b": "small"}
    curve = plan_curve(mixed, relative_to="reference")
    assert curve["plan_val"].is_monotonic_increasing
    assert (curve["val_gain"].dropna() >= -1e-9).all()
    assert made.to_dict()["relative_to"] == "reference"


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({}, "referense", "there is none.*Close matches: reference"),
        ({"method": "same"}, "same", "several are. Labels: reference, small, large"),
        ({"val": 0.0}, "reference", "above zero"),
    ],
)
def test_a_reference_that_says_nothing_is_refused(
    mixed: pd.DataFrame, change: dict[str, Any], name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(mixed.assign(**change), 2000, relative_to=name)
    gone = mixed[(mixed["label"] != "reference") | (mixed["task"] != "b")]
    with pytest.raises(ConfigError, match="no complete results for 'b'"):
        plan(gone, 2000, relative_to="reference")


def test_a_plan_is_the_best_of_all_with_joint_cells_whole_and_charged_once() -> None:
    """Against trying every plan, on tables with groups that overlap and seeds that differ."""
    for seed in range(40):
        draw = random.Random(seed)
        rows = []
        groups = [("a",), ("b",), ("c",), ("a", "b", "c"), ("b", "c"), ("a", "b")]
        for place, tasks in enumerate(groups):
            for label in ("x", "y") if len(tasks) == 1 else (f"joint{place}",):
                for number in (0, 1):
                    shared = draw.randrange(100, 900) if len(tasks) > 1 else 0
                    rows += [
                        row(task, label, draw.random(), draw.randrange(500), seed=number,
                            shared_bytes=shared, cell=f"{place}-{label}-{number}")
                        for task in tasks
                    ]  # fmt: skip
        frame = pd.DataFrame(rows)
        every = list(brute_force(frame))
        for budget in (min(b for _, b in every), 700, 1200, 10**6):
            fitting = [(round(v, 9), -b) for v, b in every if b <= budget]
            if not fitting:
                with pytest.raises(PlanError, match=f"takes {min(b for _, b in every):,} bytes"):
                    plan(frame, budget)
                continue
            made = plan(frame, budget).chosen
            assert (round(made.val[0], 9), -made.bytes) == max(fitting)


def brute_force(frame: pd.DataFrame) -> Iterator[tuple[float, int]]:
    """Score and bytes of every way to cover each task by one cell, from the table itself."""
    cells: dict[tuple[str, str], pd.DataFrame] = {}
    for _, part in frame.groupby("cell"):
        key = part["label"].iloc[0], "".join(part["task"])
        cells[key] = pd.concat([cells.get(key, part.iloc[:0]), part])
    for size in (1, 2, 3):
        for chosen in itertools.combinations(cells, size):
            if sorted("".join(tasks for _, tasks in chosen)) == ["a", "b", "c"]:
                parts = [cells[key] for key in chosen]
                means = pd.concat(parts).groupby("task")["val"].mean()
                sizes = [
                    max(p["own_bytes"].sum() + p["shared_bytes"].iloc[0]
                        for _, p in part.groupby("seed"))
                    for part in parts
                ]  # fmt: skip
                yield float(means.mean()), int(sum(sizes))


def test_what_cannot_be_chosen_is_said(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="no column val"):
        plan(frame.drop(columns="val"), 100)
    with pytest.raises(DataError, match="is empty"):
        plan(frame.iloc[:0], 100)
    with pytest.raises(PlanError, match=r"Nothing can be chosen for 'd'.*no validation score"):
        plan(pd.concat([frame, pd.DataFrame([row("d", "small", None, 1)])]), 100)
    with pytest.raises(DataError, match="not the folder of a comparison"):
        plan(Path("nowhere"), 100)


def test_a_curve_over_budgets_never_falls_and_beats_every_single_method_on_validation(
    frame: pd.DataFrame,
) -> None:
    curve = plan_curve(frame, points=9)
    assert len(curve) >= 5
    assert curve["budget_bytes"].iloc[0] == 300
    assert curve["plan_val"].is_monotonic_increasing
    assert (curve["plan_bytes"] <= curve["budget_bytes"]).all()
    assert (curve["val_gain"] >= -1e-12).all()
    assert curve["plan_val"].iloc[-1] == pytest.approx((0.9 + 0.82 + 0.7) / 3)
    stated = plan_curve(frame, ["1.3x", 1200])
    assert list(stated["budget_bytes"]) == [300, 1200]


def test_a_plan_is_written_as_yaml_or_json(frame: pd.DataFrame, tmp_path: Path) -> None:
    made = plan(frame, 1200)
    assert yaml.safe_load(made.write(tmp_path / "plan.yaml").read_text()) == made.to_dict()
    assert json.loads(made.write(tmp_path / "plan.json").read_text()) == made.to_dict()
