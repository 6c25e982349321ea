"""Means, spreads, the front: by hand."""

from __future__ import annotations

import pytest

from weft.errors import DataError
from weft.reports import Point
from weft.reports.compare import pareto_front, summarise
from weft.reports.records import check_points
from weft.reports.tradeoff import draw_tradeoff, method_places


def point(method: str, score: float, size: int, *, task: str = "t", seed: int = 0) -> Point:
    return Point(method, task, seed, score, size, size / 1000, "accuracy")


def test_front_by_hand() -> None:
    points = [
        point("probe", 0.70, 0),
        point("small", 0.80, 100),
        point("worse and bigger", 0.79, 150),
        point("same score, bigger", 0.80, 200),
        point("best", 0.90, 500),
        point("full", 0.89, 1000),
    ]
    front = pareto_front(summarise(points, "accuracy"))
    assert [s.method for s in front] == ["probe", "small", "best"]


def test_equals_are_both_on_the_front() -> None:
    front = pareto_front(summarise([point("a", 0.8, 10), point("b", 0.8, 10)], "accuracy"))
    assert {s.method for s in front} == {"a", "b"}


def test_front_of_an_error_is_turned_round() -> None:
    points = [
        Point(m, "t", 0, error, size, 0.1, "error", higher_is_better=False)
        for m, error, size in [("a", 0.3, 10), ("b", 0.2, 20), ("c", 0.25, 30)]
    ]
    assert [s.method for s in pareto_front(summarise(points, "error"))] == ["a", "b"]


def test_spread_is_between_seeds_and_not_between_tasks() -> None:
    points = [
        point("m", score, size, task=task, seed=seed)
        for task, seed, score, size in [
            ("easy", 0, 0.9, 100),
            ("hard", 0, 0.5, 300),
            ("easy", 1, 0.94, 100),
            ("hard", 1, 0.5, 340),
            ("easy", 2, 0.9, 100),
            ("hard", 2, 0.46, 300),
        ]
    ]
    (summary,) = summarise(points, "accuracy")
    assert [score for _, score in summary.runs] == pytest.approx([0.70, 0.72, 0.68])
    assert summary.score == pytest.approx(0.70)
    assert summary.spread == pytest.approx(0.02)
    assert summary.own_bytes == pytest.approx((200 + 220 + 200) / 3)
    assert summary.bytes_spread == pytest.approx(20 / 3**0.5)


def test_one_seed_has_no_spread() -> None:
    (summary,) = summarise([point("m", 0.5, 10)], "accuracy")
    assert summary.spread is None


def test_incomplete_and_diverged_seeds_are_left_out_and_counted() -> None:
    points = [
        point("a", 0.9, 10, task="x", seed=0),
        point("a", 0.7, 10, task="y", seed=0),
        point("a", 0.9, 10, task="x", seed=1),
        point("a", float("nan"), 10, task="y", seed=1),
        point("b", 0.99, 10, task="x", seed=0),
    ]
    a, b = summarise(points, "accuracy")
    assert a.score == pytest.approx(0.8)
    assert a.left_out == 1
    assert not b.runs
    assert [s.method for s in pareto_front([a, b])] == ["a"]
    (alone, _) = summarise(points, "accuracy", ["x"])
    assert len(alone.runs) == 2


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([point("a", 0.1, 5), point("a", 0.2, 5)], "Give each run once"),
        ([point("a", 0.1, -5)], "expected >= 0"),
        (
            [point("a", 0.1, 5), Point("b", "t", 0, 0.1, 5, 0.1, "accuracy", False)],
            "disagree",
        ),
    ],
)
def test_unreadable_comparisons_are_refused(points: list[Point], said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_points(points)


def test_markers_off_the_front_are_hollow_and_zero_bytes_has_a_place() -> None:
    points = [point("probe", 0.7, 0), point("a", 0.8, 100), point("b", 0.75, 5000)]
    svg = draw_tradeoff(method_places(summarise(points, "accuracy")), "accuracy").svg()
    assert 'class="m0"' in svg
    assert 'class="m1"' in svg
    assert 'class="h2"' in svg
    assert ">0\u00a0B<" in svg
    assert "nan" not in svg


def test_labels_do_not_overlap() -> None:
    from weft.reports.axes import text_width
    from weft.reports.drawing import Text
    from weft.reports.labels import overlap

    points = [point(f"method {i}", 0.8 + 0.002 * i, 100 + 9 * i) for i in range(9)]
    drawing = draw_tradeoff(method_places(summarise(points, "accuracy")), "accuracy")
    boxes = []
    for mark in drawing.marks:
        if isinstance(mark, Text) and mark.style == "label":
            width = text_width(mark.text, 12)
            left = mark.at[0] - {"start": 0, "middle": width / 2, "end": width}[mark.anchor]
            boxes.append((left, mark.at[1] - 10, left + width, mark.at[1] + 2))
    assert len(boxes) == 9
    for i, a in enumerate(boxes):
        assert all(overlap(a, b) == 0 for b in boxes[i + 1 :])
