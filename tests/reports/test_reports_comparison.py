"""The page of a comparison: what it answers, from whole and partial results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from html_page import Page

import weft
from weft.comparing import Fleet, open_fleet, read_comparison
from weft.errors import ConfigError, DataError, PlanError
from weft.registry import METHODS
from weft.reporting.comparisons import read_compared
from weft.reporting.methods_text import paragraph
from weft.reports.answer_text import verdict
from weft.reports.compared import Answer
from weft.reports.plan_figure import Budget, Choice

BASE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
"""
SIZES = {"linear_probe": 0, "bias_only": 64, "full_finetune": 1000}
TASKS = ("easy", "hard")


def rows(seeds: int = 3, **changes: Any) -> list[dict[str, Any]]:
    """A table in which the hard task needs bytes and the easy one does not."""
    found = []
    for task in TASKS:
        for place, (method, size) in enumerate(SIZES.items()):
            for seed in range(seeds):
                score = 0.9 if task == "easy" else 0.5 + 0.2 * place
                found.append(
                    {
                        "task": task,
                        "method": method,
                        "label": method,
                        "options": "{}",
                        "train": "{}",
                        "seed": seed,
                        "cell": f"{task}-{method}-{seed}",
                        "metric": "accuracy",
                        "higher_is_better": True,
                        "val": score + 0.01 * seed,
                        "test": score - 0.02 + 0.01 * seed,
                        "own_bytes": size,
                        "own_fraction": size / 1000,
                        "head_bytes": 40,
                        "shared_bytes": 0,
                        "base_bytes": 1000,
                        "base_parameters": 250,
                        "seconds": 1.5,
                        "latency_ms_per_row": 0.1,
                        "peak_memory_bytes": 10**8,
                        "weft": "1",
                        "torch": "2",
                        **changes,
                    }
                )
    return found


def page_of(source: Any, folder: Path, **options: Any) -> tuple[Page, str]:
    text = weft.report(source, folder / "page.html", **options).read_text(encoding="utf-8")
    return Page(text), text


def test_the_answer_is_on_top(tmp_path: Path) -> None:
    page, _ = page_of(pd.DataFrame(rows()), tmp_path, budget=1000)
    assert (
        "Within 1.0 kB for all tasks together, a method for each task reaches 89.0 % ± 1.0 test "
        "accuracy; the best single method that fits, bias_only, reaches 79.0 % ± 1.0 with 128 B."
    ) in page.text
    assert "This budget was asked for" in page.text
    answer = read_compared(pd.DataFrame(rows()), 1000).answer
    assert answer is not None
    assert {o.task: o.label for o in answer.owners} == {
        "easy": "linear_probe",
        "hard": "full_finetune",
    }


def test_the_default_budget_is_the_smallest_that_brings_most(tmp_path: Path) -> None:
    page, _ = page_of(pd.DataFrame(rows()), tmp_path)
    assert "Within 1.0 kB" in page.text
    assert "smallest budget of the curve that brings 95 %" in page.text


def test_one_method_for_all_is_said_as_such(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows()).query("label != 'bias_only'").copy()
    frame.loc[frame.label == "full_finetune", ["val", "test"]] += 0.1
    page, _ = page_of(frame, tmp_path)
    assert "one method for all of them is best: full_finetune reaches" in page.text


def test_a_plan_of_many_tasks_is_told_by_method_first(tmp_path: Path) -> None:
    many = [{**row, "task": f"{row['task']} {i}"} for i in range(11) for row in rows(seeds=1)]
    text = page_of(pd.DataFrame(many), tmp_path, budget=11 * 1000)[1]
    assert "By method: linear_probe for 11 tasks, full_finetune for 11 tasks." in text
    assert "<summary>Every task <small>22 rows</small></summary>" in text
    few = page_of(pd.DataFrame(rows()), tmp_path, budget=1000)[1]
    assert "By method" not in few


def without_test(*missing: tuple[str, str, int]) -> pd.DataFrame:
    """The table without the test scores of some task, method and seed."""
    frame = pd.DataFrame(rows())
    for task, method, seed in missing:
        here = (frame.task == task) & (frame.method == method) & (frame.seed == seed)
        frame.loc[here, "test"] = None
    return frame


def test_all_choices_are_shown_on_one_split(tmp_path: Path) -> None:
    frame = without_test(("easy", "linear_probe", 0))
    answer = read_compared(frame, 1000).answer
    assert answer is not None
    assert answer.metric == "validation accuracy"
    assert all(b.plan.test == b.plan.val for b in answer.budgets)
    text = page_of(frame, tmp_path, budget=1000)[1]
    assert "scored on test" not in text
    assert "scores better on validation than the best single method" in text


def test_without_test_data_nothing_speaks_of_test_scores(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows()).assign(test=None)
    text = page_of(frame, tmp_path, budget=1000)[1]
    assert "better on test" not in text
    assert "scored on test" not in text
    assert "reported on the test split" not in text


def test_an_undefined_score_takes_away_its_own_point_alone() -> None:
    frame = without_test(("easy", "linear_probe", 0))
    compared = read_compared(frame, 1000)
    assert len(compared.tests) == len(frame) - 1
    assert {point.metric for point in compared.tests} == {"test accuracy"}
    frame.loc[frame.method == "linear_probe", "val"] = None
    assert len(read_compared(frame, 1000).vals) == len(frame) - 6


def choice(test: float, spread: float | None = None) -> Choice:
    return Choice(10, test, test, spread, "m")


@pytest.mark.parametrize(
    ("plan", "single", "higher", "said"),
    [
        (0.9, 0.8, True, "fits at 1, the same within the spread at 0, and worse at 0; +10.0"),
        (0.8, 0.9, True, "fits at 0, the same within the spread at 0, and worse at 1; -10.0"),
        (0.8, 0.9, False, "fits at 1, the same within the spread at 0, and worse at 0; +10.0"),
    ],
)
def test_the_verdict_says_who_wins_on_test(
    plan: float, single: float, higher: bool, said: str
) -> None:
    at = Budget(10, choice(plan, 0.01), choice(single, 0.02))
    answer = Answer(10, "", (), (at,), at, 0, None, "test accuracy", higher)
    assert said in verdict(answer)


def test_a_difference_within_the_spread_is_none() -> None:
    at = Budget(10, choice(0.9, 0.05), choice(0.88, 0.01))
    answer = Answer(10, "", (), (at,), at, 0, None, "test accuracy", True)
    assert "at 0, the same within the spread at 1, and worse at 0" in verdict(answer)


def test_a_single_seed_has_no_spread(tmp_path: Path) -> None:
    page, _ = page_of(pd.DataFrame(rows(seeds=1)), tmp_path)
    assert "a single seed, so that no spread is known" in page.text
    assert "±" not in page.text


def test_metrics_without_a_mean_leave_the_rest_of_the_page(tmp_path: Path) -> None:
    table = rows()
    for row in table:
        if row["task"] == "hard":
            row |= {"metric": "mae", "higher_is_better": False}
    page, _ = page_of(pd.DataFrame(table), tmp_path)
    assert "There is no plan to show: " in page.text
    assert "relative_to" in page.text  # the next step
    assert page.text.count("Pareto front of the validation scores") == 1
    assert "test mae, hard" in page.text


def test_without_test_data_validation_is_shown(tmp_path: Path) -> None:
    page, _ = page_of(pd.DataFrame(rows(test=None)), tmp_path)
    assert "validation accuracy" in page.text
    assert "test accuracy" not in page.text


def test_names_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = '<img src="http://x/y"><script>alert(1)</script>'
    table = [{**row, "task": evil if row["task"] == "easy" else row["task"]} for row in rows()]
    page, text = page_of(pd.DataFrame(table), tmp_path)
    assert "<script>alert" not in text
    assert "img" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#"), tag


def test_the_paragraph_cites_what_was_compared(tmp_path: Path) -> None:
    page, text = page_of(pd.DataFrame(rows()), tmp_path)
    said = page.text
    assert "linear probe, bias only (Ben Zaken et al., 2022) and full finetune" in said
    assert "means over 3 training seeds" in said
    assert "@inproceedings{benzaken2022bitfit," in text
    assert "author = {Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav}" in said


def test_the_paragraph_says_how_each_was_trained() -> None:
    comparison = read_comparison(
        {
            "base": {"name": "python:net.py:make"},
            "tasks": {task: {"data": "npz:x.npz"} for task in TASKS},
            "methods": [
                "full_finetune",
                {"name": "bias_only", "train": {"lr": 0.1}},
                {"name": "scale_bias", "train": {"lr": 0.1}},
                {"name": "linear_probe", "pretrain": {"epochs": 7}},
            ],
            "train": {"epochs": 5, "lr": 0.02},
        }
    )
    text = paragraph(rows(), TASKS, range(3), Fleet(comparison, ()))
    assert (
        "Training took 5 epochs with batches of 32 at a learning rate of 0.02, with lr = 0.1 for "
        "bias only and scale bias. For linear probe the base was first trained on all of its "
        "tasks together, for 7 epochs at a learning rate of 0.01." in text
    )


def test_every_method_of_a_paper_has_a_citation() -> None:
    without = {name for name, entry in METHODS.items() if entry.citation is None}
    assert without == {"linear_probe", "full_finetune"}
    works = {entry.citation for entry in METHODS.values() if entry.citation is not None}
    assert len({work.key for work in works}) == len(works)


def test_the_table_can_be_filtered_and_sorted(tmp_path: Path) -> None:
    page, text = page_of(pd.DataFrame(rows()), tmp_path)
    assert text.count("<tr data-planned>") == len(TASKS)
    options = [a.get("value") for tag, a in page.tags if tag == "option"]
    assert len(options) == 2 + len(TASKS) + len(SIZES)
    assert re.search(r'<form class="filter"[^>]* hidden>', text)  # a script shows it


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"budget": "many"}, ConfigError, "budget"),
        ({"budget": -1}, ConfigError, "at least 0"),
        ({"comparison": ["point"]}, DataError, "leave out comparison"),
    ],
)
def test_wrong_questions_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        weft.report(pd.DataFrame(rows()), tmp_path / "page.html", **options)


def test_a_budget_that_nothing_fits_says_the_least() -> None:
    table = [row for row in rows() if row["label"] == "full_finetune"]
    with pytest.raises(PlanError, match="2,000 bytes"):
        read_compared(pd.DataFrame(table), 10)


def test_folders_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a bank nor the folder of a comparison"):
        weft.report(tmp_path, tmp_path / "page.html")
    with pytest.raises(DataError, match="is no folder"):
        weft.report(tmp_path / "none", tmp_path / "page.html")
    with pytest.raises(DataError, match="No cell of the comparison is finished"):
        weft.report(pd.DataFrame(), tmp_path / "page.html")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small comparison that was really run, with one method that fails."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "net.py").write_text(BASE)
    generator = np.random.default_rng(0)
    for name in TASKS:
        y = generator.integers(0, 2, 80)
        x = (generator.integers(0, 120, (80, 3, 2, 2)) + 90 * y[:, None, None, None]).astype("u1")
        np.savez(folder / f"{name}.npz", x=x, y=y)
    weft.compare(
        {
            "base": {"name": f"python:{folder / 'net.py'}:make"},
            "tasks": {n: {"data": f"npz:{folder / n}.npz"} for n in TASKS},
            "methods": ["linear_probe", "bias_only", "full_finetune", "depthwise_patch"],
            "seeds": 2,
            "train": {"epochs": 3, "lr": 0.05},
            "output": str(folder / "run"),
        },
        progress=False,
    )
    return folder / "run"


def test_a_folder_is_reported_with_what_tasks_own(run: Path, tmp_path: Path) -> None:
    page, text = page_of(run, tmp_path, budget="1MB", figures=tmp_path / "figures")
    assert "on one base, net.py:make" in page.text
    assert text.count('class="map-data"') >= 1
    assert "Validation scores after each epoch" in page.text
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"plan.svg", "plan.png", "epochs-easy.svg", "tradeoff-test-accuracy.svg"} <= names
    assert any(name.startswith("layers-") for name in names)


def test_failures_are_listed_with_their_reason(run: Path, tmp_path: Path) -> None:
    page, _ = page_of(run, tmp_path)
    assert "4 cells are missing, of which 4 failed" in page.text
    assert "easy-depthwise_patch-seed0" in page.text
    assert re.search(r"depthwise", page.text[page.text.index("4 cells failed") :])


def test_the_budget_of_a_plan_in_the_folder_is_shown(run: Path) -> None:
    weft.plan(run, 77).write(run / "plan.yaml")
    try:
        compared = read_compared(run, None)
        assert compared.answer is not None
        assert compared.answer.budget == 77
        (run / "plan.yaml").write_text("nothing: here")
        with pytest.raises(DataError, match="is no plan"):
            read_compared(run, None)
    finally:
        (run / "plan.yaml").unlink()


def test_what_the_plan_in_the_folder_was_asked_is_asked_here(run: Path) -> None:
    weft.plan(run, "1MB", relative_to="linear_probe").write(run / "plan.yaml")
    try:
        answer = read_compared(run, None).answer
        assert answer is not None
        assert answer.metric == "test improvement over linear_probe, %"
        assert answer.higher_is_better
    finally:
        (run / "plan.yaml").unlink()


def test_a_plan_that_counts_heads_is_shown_as_it_is(run: Path) -> None:
    made = weft.plan(run, "1MB", heads=True, max_seeds=1, objective="worst")
    made.write(run / "plan.yaml")
    try:
        answer = read_compared(run, None).answer
        assert answer is not None
        assert answer.at.plan.bytes == made.chosen.bytes
        assert answer.at.plan.bytes > sum(owner.own_bytes for owner in answer.owners)
        assert answer.of == "worst task"
    finally:
        (run / "plan.yaml").unlink()


def test_a_plan_whose_budget_fits_no_more_leaves_the_rest_of_the_page(run: Path) -> None:
    weft.plan(run, "1MB").write(run / "plan.yaml")
    stated = yaml.safe_load((run / "plan.yaml").read_text()) | {"budget_bytes": 0}
    stated["counted"] = "own and shared bytes and heads"
    (run / "plan.yaml").write_text(yaml.safe_dump(stated))
    try:
        compared = read_compared(run, None)
        assert compared.answer is None
        assert "Nothing fits a budget of 0 bytes" in compared.no_answer
        assert compared.tests
        with pytest.raises(PlanError, match="Nothing fits"):
            read_compared(run, 0)
    finally:
        (run / "plan.yaml").unlink()


def test_gone_bundles_leave_the_rest_of_the_page(run: Path, tmp_path: Path) -> None:
    moved = []
    for cell in open_fleet(run).cells:
        if cell.folder.bank.is_dir():
            moved.append((cell.folder.bank.rename(cell.folder.root / "away"), cell.folder.bank))
    try:
        page, _ = page_of(run, tmp_path)
        assert "The bundles of the cells are gone" in page.text
        assert "Score against budget" in page.text
    finally:
        for away, home in moved:
            away.rename(home)


def test_the_comparison_of_a_folder_is_what_was_asked(run: Path) -> None:
    stated = read_comparison(open_fleet(run).comparison)
    compared = read_compared(run, None)
    assert compared.tasks == tuple(stated.tasks)
    assert compared.seeds == stated.seeds
    assert set(compared.curves) == set(TASKS)
    assert all(len(curve) == 3 for curves in compared.curves.values() for curve in curves.values())
