"""What a person sees of a fleet, on a terminal and elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from weft.comparing import make_fleet, read_comparison
from weft.comparing.attempts import Outcome
from weft.comparing.progress import Display, Estimate, duration


def shown(content: dict[str, Any], *, terminal: bool, enabled: bool = True) -> str:
    cells = list(make_fleet(read_comparison(content)).cells)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Display(enabled, cells, 4, Estimate(cells, 2), console) as display:
        for cell in cells[:2]:
            display(cell, None)
        display(cells[0], 1)
        display(cells[0], Outcome("finished"))
        display(cells[1], Outcome("failed", "because"))
        display(cells[2], None)
        display(cells[2], Outcome("elsewhere"))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_every_end_is_a_line_with_the_time_left(content: dict[str, Any], terminal: bool) -> None:
    text = shown(content, terminal=terminal)
    assert "5/7 bright scale_bias seed 0: 0.0 s  about 0 s left" in text
    assert "6/7 red scale_bias seed 0: failed" in text
    assert "7/7 2 tasks hard_sharing train.lr=0.02 seed 0: another process runs it" in text
    assert ("cells" in text) == terminal


def test_nothing_is_shown_where_nothing_is_wanted(content: dict[str, Any]) -> None:
    assert shown(content, terminal=False, enabled=False) == ""


def test_the_time_left_is_that_of_alike_cells(content: dict[str, Any]) -> None:
    cells = make_fleet(read_comparison(content)).cells
    estimate = Estimate(cells, jobs=2)
    assert estimate.seconds() is None
    estimate.learn(cells[0], 10.0)
    assert estimate.seconds() == pytest.approx((10 + 10 + 20) / 2)
    estimate.drop(cells[0])
    estimate.share(cells[1], 0.5)
    assert estimate.seconds() == pytest.approx((5 + 20) / 2)
    assert [duration(s) for s in (20, 200, 7500)] == ["20 s", "3 min", "2 h 05 min"]
