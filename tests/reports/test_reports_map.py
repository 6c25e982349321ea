"""The map of layers by tasks, and the curves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from report_fakes import fake_history, fake_report

from weft.core.ledger import Ledger, Row
from weft.reports import TaskReport
from weft.reports.curves import draw_curves, epochs_of, phases_of, score_name
from weft.reports.drawing import Line, Text
from weft.reports.layer_map import layer_map, map_data
from weft.reports.map_drawing import Intensity, draw_map


def row(site: str, *, own: int = 0, score: float | None = None, size: int = 10) -> Row:
    kind = "layer" if size else "adapter"
    return Row(f"{site}.weight", site, kind, own == 0, False, size, own, own * 4, score)


def task(name: str, *rows: Row) -> TaskReport:
    return TaskReport(name, "m", Ledger(name, rows, 5, 20))


def test_states_and_scores() -> None:
    a = task("a", row("l1", score=0.05), row("l2", own=10, score=0.3), row("l3", own=10))
    b = task(
        "b", row("l1"), row("l2"), row("l3"), row("l2", own=4, size=0), row("l9", own=4, size=0)
    )
    data = layer_map([a, b], ["a", "b"])
    assert [s for s, _ in data.sites] == ["l1", "l2", "l3", "l9"]
    cells = [[(c.state, c.score) if c else None for c in line] for line in data.cells]
    assert cells == [
        [("shared", 0.05), ("shared", None)],
        [("own", 0.3), ("added", None)],
        [("own", None), ("shared", None)],
        [None, ("added", None)],
    ]
    assert dict(data.sites)["l2"] == "layer"
    drawing, grid = draw_map(data)
    styles = [mark.style for mark in drawing.marks]
    for style in ("o4", "ungated", "added", "ring", "dot"):
        assert style in styles
    plain: Any = map_data(data, grid)
    assert plain["cells"][1] == [["o", "10", 0.3], ["a", "4", None]]
    assert plain["cells"][3] == [0, ["a", "4", None]]


def test_added_sites_stand_before_the_module_they_wrap() -> None:
    data = layer_map(
        [task("a", row("b.0.conv"), row("b.1.conv"), row("b.1", own=3, size=0))], ["a"]
    )
    assert [s for s, _ in data.sites] == ["b.0.conv", "b.1", "b.1.conv"]


def test_intensity_rises_with_the_score() -> None:
    scale = Intensity([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [scale.level(s) for s in (0.1, 0.25, 0.35, 0.5)] == [1, 2, 3, 4]
    assert scale.bounds() == ["0.10", "0.20", "0.30", "0.40"]
    assert Intensity([0.2]).bounds() == ["0.20"]
    assert len(set(Intensity([0.1, 0.104]).bounds())) == 4


def test_text_fits_its_cell_or_is_left_out() -> None:
    few = layer_map([fake_report("a", 5, norms=False)], ["a"])
    many = layer_map([fake_report(f"t{i}") for i in range(40)], [f"t{i}" for i in range(40)])
    assert any(isinstance(m, Text) and m.style.startswith("cell") for m in draw_map(few)[0].marks)
    drawing, grid = draw_map(many)
    cells = [m for m in drawing.marks if isinstance(m, Text) and m.at[1] > grid.top]
    assert not any(m.style.startswith("cell") for m in cells)
    assert len(drawing.svg()) < 150_000
    assert drawing.width < 1100


def test_phases_and_epochs() -> None:
    history = fake_history(10)
    assert [(n, a, b) for n, a, b in phases_of(history)] == [
        ("warm-up", 0, 2),
        ("select", 3, 6),
        ("harden", 7, 9),
    ]
    assert epochs_of([{"epoch": 4}, {"epoch": 5}]) == [4, 5]
    assert epochs_of([{"epoch": 4}, {}, {"epoch": 4}]) == [1, 2, 3]


def test_three_panels_with_phases_marked() -> None:
    panels = draw_curves(fake_report("a"))
    assert list(panels) == ["loss", "score", "gates"]
    for panel in panels.values():
        words = [m.text for m in panel.marks if isinstance(m, Text)]
        assert "select" in words
        assert "harden" in words
        assert "epoch" in words
        assert sum(m.style == "edge" for m in panel.marks) == 2
    for style in ("l0", "d1"):
        lines = [m for m in panels["loss"].marks if isinstance(m, Line) and m.style == style]
        assert [len(m.points) for m in lines] == [30, 2]  # the curve, and its key in the legend


def test_a_gap_in_the_history_is_a_gap_in_the_line() -> None:
    history = [{"epoch": e, "loss": float("nan") if e in (3, 6) else 1 / e} for e in range(1, 10)]
    panels = draw_curves(replace(fake_report("a"), history=history))
    assert list(panels) == ["loss"]
    lines = [m for m in panels["loss"].marks if isinstance(m, Line) and m.style == "l0"]
    # Two pieces of the curve with a gap at 3 and 6, the third a part of the legend.
    assert [len(m.points) for m in lines] == [2, 2, 3, 2]
    assert "nan" not in panels["loss"].svg()


def test_histories_that_say_little() -> None:
    report = fake_report("a")
    assert draw_curves(replace(report, history=())) == {}
    assert draw_curves(replace(report, history=[{"epoch": 1, "phase": "train"}])) == {}
    assert list(draw_curves(replace(report, history=[{"loss": 0.5}]))) == ["loss"]
    assert list(draw_curves(replace(report, history=[{"own_fraction": 0.5}] * 2))) == ["gates"]
    named = replace(report, history=[{"val": {"loss": 1.0, "f1": 0.2, "accuracy": 0.3}}])
    assert score_name(named) == "accuracy"
    assert score_name(replace(named, metrics={})) == "f1"
