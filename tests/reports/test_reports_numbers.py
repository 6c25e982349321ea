"""Numbers as people read them."""

from __future__ import annotations

import pytest

from weft.reports.axes import Scale, log_ticks, nice_step
from weft.reports.numbers import (
    bytes_text,
    count_text,
    metric_text,
    percent_text,
    shorten,
    significant,
    spread_text,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (950, "950 B"), (12_345, "12.3 kB"), (1_600_000, "1.6 MB"), (999_700, "1.0 MB")],
)
def test_bytes(size: int, text: str) -> None:
    assert bytes_text(size).replace("\u00a0", " ") == text


def test_counts() -> None:
    assert count_text(52) == "52"
    assert count_text(2_223_872).replace("\u00a0", " ") == "2.2 M"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.384, "38.4 %"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.0001, "< 0.1 %"),
        (float("nan"), "not finite"),
    ],
)
def test_percents(share: float, text: str) -> None:
    assert percent_text(share).replace("\u00a0", " ") == text


def test_metrics() -> None:
    assert metric_text("test accuracy", 0.8734).replace("\u00a0", " ") == "87.3 %"
    assert metric_text("val loss", 0.8734) == "0.873"
    assert metric_text("val rmse", float("inf")) == "not finite"
    assert spread_text("test accuracy", 0.012) == " ± 1.2"
    assert spread_text("test accuracy", None) == ""
    assert significant(-0.00123, 2) == "-0.0012"


def test_long_names_lose_their_middle() -> None:
    assert shorten("abc", 5) == "abc"
    assert len(shorten("a" * 50, 20)) == 20
    assert shorten("blocks.0.conv", 9).endswith("conv")


def test_ticks_are_round_and_inside() -> None:
    assert nice_step(0.3) == 0.5
    assert log_ticks(900, 2_500_000, 5) == [1e3, 1e4, 1e5, 1e6]
    assert Scale(0.18, 0.93, 0, 1).ticks(4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    narrow = Scale(210_000, 380_000, 0, 1, log=True).ticks(6)
    assert len(narrow) >= 3
    assert all(210_000 <= t <= 380_000 for t in narrow)


def test_log_scale_is_even_in_ratios() -> None:
    scale = Scale(1, 100, 0, 200, log=True)
    assert scale(10) == pytest.approx(100)
