"""The page: what it says, that it is safe and whole, and its figures as files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from html_page import Page
from report_fakes import METHODS, fake_ledger, fake_points, fake_report
from torch import nn

import weft
from weft.errors import DataError
from weft.reports import HasTaskReports, TaskReport, from_model, overview_figure, report
from weft.reports.drawing import Drawing


def write(folder: Path, *args: object, **options: object) -> str:
    path = report(*args, folder / "out" / "r.html", **options)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def test_all_parts_are_there(tmp_path: Path) -> None:
    names = ["flowers", "aircraft", "signs"]
    reports = [fake_report(n, seed=i) for i, n in enumerate(names)]
    page = Page(write(tmp_path, reports, comparison=fake_points(3), title="My bank"))
    for said in ("My bank", "3 tasks", "Ledger", "Which layers", "Training", "Pareto front"):
        assert said in page.text
    own = sum(r.ledger.own_bytes for r in reports)
    assert f"They own {own / 1e6:.1f} MB together" in page.text
    share = own / sum(r.full_bytes for r in reports)
    assert f"{share * 100:.1f} % of what 3 full copies would take" in page.text
    for r in reports:
        opened, gates = r.ledger.open_gates
        assert f"{opened} of {gates}" in page.text
        assert f"{r.ledger.own_fraction * 100:.1f} %" in page.text
    for method in METHODS:
        assert method in page.text
    # Cost, map, three curves a task, the comparison, and that of each task.
    assert page.count("svg") == 1 + 1 + 3 * 3 + 1 + 3
    assert sum(a.get("class") == "save" for _, a in page.tags) == page.count("svg")


def test_spread_and_front_are_told(tmp_path: Path) -> None:
    points = fake_points()
    page = Page(write(tmp_path, [fake_report("a")], comparison=points))
    rows = dict(re.findall(r"(taps|hard_sharing)([\d.]+ % ± \d+\.\d)", page.text))
    for method in ("taps", "hard_sharing"):
        seeds = [
            statistics.fmean(p.score for p in points if (p.method, p.seed) == (method, seed))
            for seed in range(3)
        ]
        mean, spread = statistics.fmean(seeds), statistics.stdev(seeds)
        assert rows[method] == f"{mean * 100:.1f} % ± {spread * 100:.1f}"
    assert page.text.count("on the front") == 6


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&\x01"
    r = fake_report(evil, 5)
    rows = tuple(replace(row, site=f"{evil}{row.site}") for row in r.ledger.rows)
    r = replace(r, method="<img src=x>", ledger=replace(r.ledger, rows=rows))
    r = replace(r, metrics={"</td><b>x": 0.5})
    points = [replace(p, method=f"{p.method}</svg><i>", task=evil) for p in fake_points(2, 1)[::2]]
    text = write(tmp_path, [r], comparison=points, title="</title><u>")
    page = Page(text)
    assert page.count("script") == 2
    assert not {"img", "b>x", "i", "u"} & {t for t, _ in page.tags}
    assert "<script>alert" not in text
    assert "alert(1)" in page.text
    data = re.search(r'class="map-data">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data[1])["tasks"] == [evil]


def test_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path, [fake_report("a")], comparison=fake_points())
    assert "http:" not in text
    assert "https:" not in text
    assert "//cdn" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_allows_exactly_the_script(tmp_path: Path) -> None:
    text = write(tmp_path, [fake_report("a")])
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_every_anchor_and_label_has_its_target(tmp_path: Path) -> None:
    page = Page(write(tmp_path, [fake_report("a")]))
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        target = attributes.get("href") or attributes.get("aria-labelledby")
        assert target is None or target.lstrip("#") in ids


def test_deterministic(tmp_path: Path) -> None:
    def once(folder: str) -> dict[str, bytes]:
        reports = [fake_report("a"), fake_report("b", seed=1)]
        out = tmp_path / folder
        report(reports, out / "r.html", comparison=fake_points(2), figures=out / "figures")
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    assert once("x") == once("y")


def test_size_is_modest(tmp_path: Path) -> None:
    reports = [fake_report(f"task {i}", 60, seed=i, norms=False) for i in range(20)]
    assert len(write(tmp_path, reports).encode()) < 500_000


@pytest.mark.parametrize("gates", [0, 5])
def test_no_history_no_gates_no_metrics_one_task(tmp_path: Path, gates: int) -> None:
    r = TaskReport("only", "linear_probe", fake_ledger("only", gates))
    text = write(tmp_path, [r])
    page = Page(text)
    assert "1 task on one base" in page.text
    assert "nan" not in page.text.lower()
    assert 'id="training"' not in text
    assert 'id="tradeoff"' not in text
    assert not any(a.get("href") in ("#training", "#tradeoff") for _, a in page.tags)


def test_one_point_and_scores_that_are_not_finite(tmp_path: Path) -> None:
    r = replace(fake_report("a", 5), metrics={"test rmse": float("nan")}, history=[])
    page = Page(write(tmp_path, [r], comparison=fake_points(1, 1)[:1]))
    assert "not finite" in page.text
    diverged = [replace(p, score=float("nan")) for p in fake_points(1, 1)[:1]]
    assert "1 left out" in Page(write(tmp_path, [r], comparison=diverged)).text


def test_tasks_themselves_without_a_comparison(tmp_path: Path) -> None:
    other = replace(fake_report("c", 5), metrics={"val rmse": 1.2})
    text = write(tmp_path, [fake_report("a", 5), fake_report("b", 5), other])
    page = Page(text)
    names = [a["data-name"] for t, a in page.tags if t == "svg"]
    assert "tradeoff-test accuracy" in names
    assert "tradeoff-val rmse" in names
    assert "Pareto" not in page.text


def test_one_task_by_two_methods_keeps_both_apart(tmp_path: Path) -> None:
    reports = [fake_report("a", 5), replace(fake_report("a", 5), method="lora")]
    page = Page(write(tmp_path, reports))
    assert "a (taps)" in page.text
    assert "a (lora)" in page.text


def test_figures_as_files(tmp_path: Path) -> None:
    reports = [fake_report("a/b"), fake_report("a b", seed=1), fake_report("<é>", seed=2)]
    folder = tmp_path / "figures"
    report(reports, tmp_path / "r.html", comparison=fake_points(1), figures=folder)
    names = sorted(p.name for p in folder.iterdir())
    stems = ["cost", "layers", "tradeoff-test-accuracy", "training-a-b", "training-a-b-2"]
    assert {f"{s}.{end}" for s in stems for end in ("svg", "png")} <= set(names)
    assert len(names) == 12
    for path in folder.glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        style = root[0].text or ""
        assert "prefers-color-scheme:dark" in style
        used = {e.get("class", "").split()[-1] for e in root.iter() if e.get("class")} - {"fig"}
        assert all(f".fig .{name}{{" in style for name in used)
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_shows_what_the_drawing_holds(tmp_path: Path) -> None:
    from matplotlib.image import imread

    from weft.reports.raster import save_png

    drawing = Drawing(100, 50, "")
    drawing.rect(0, 0, 50, 50, "o4")
    save_png(drawing, tmp_path / "x.png", scale=1.0)
    pixels = imread(tmp_path / "x.png")
    assert pixels.shape[:2] == (50, 100)
    assert pixels[25, 20, :3] == pytest.approx([0x0B / 255, 0x4F / 255, 0x9C / 255], abs=0.01)
    assert pixels[25, 80, :3] == pytest.approx([1, 1, 1])


def test_overview_figure(tmp_path: Path) -> None:
    svg = overview_figure(fake_points(), tmp_path / "new" / "o.svg").read_text(encoding="utf-8")
    for method in METHODS:
        assert f">{method}<" in svg
    assert ">Pareto front<" in svg
    png = overview_figure(fake_points(), tmp_path / "o.png")
    assert png.stat().st_size > 5_000
    with pytest.raises(DataError, match=r"\.png or \.svg"):
        overview_figure(fake_points(), tmp_path / "o.pdf")
    with pytest.raises(DataError, match="found none"):
        overview_figure([], tmp_path / "o.png")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task"):
        report([], tmp_path / "r.html")
    with pytest.raises(DataError, match="found dict"):
        report({}, tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one base"):
        report([fake_report("a", 5), fake_report("b", 6)], tmp_path / "r.html")
    with pytest.raises(DataError, match="Give each run once"):
        report([fake_report("a", 5)], tmp_path / "r.html", comparison=fake_points(1, 1) * 2)
    assert not (tmp_path / "r.html").exists()


def test_from_a_bank_like_object(tmp_path: Path) -> None:
    class Shelf:
        def task_reports(self) -> list[TaskReport]:
            return [fake_report("shelved", 5)]

    assert isinstance(Shelf(), HasTaskReports)
    assert "shelved" in Page(write(tmp_path, Shelf())).text


def test_from_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = weft.MultiTaskModel(base, weft.taps(base), example=torch.zeros(2, 4))
    model.add_task("a", weft.Classification(2))
    model.add_task("b", weft.Classification(5), sharing=weft.linear_probe(base))
    model.tasks["a"].facts.update(
        metrics={"val": {"loss": 0.4, "accuracy": 0.9}, "test": {"loss": 0.5, "accuracy": 0.8}},
        history=[{"epoch": 1, "phase": "train", "loss": 1.0, "val": {"accuracy": 0.5}}],
    )
    a, b = from_model(model)
    assert list(a.metrics) == ["test accuracy", "val accuracy", "test loss", "val loss"]
    assert a.primary == ("test accuracy", 0.8)
    assert (a.method, b.method) == ("taps", "linear_probe")
    numbers = 4 * 8 + 8 + 4 * 8 + 8 * 3 + 3  # both linear layers, the norm's four vectors
    assert a.base_bytes == numbers * 4 + 8  # and its count of batches, a 64-bit integer
    assert b.metrics == {}
    assert b.ledger.own_bytes == 0
    page = Page(write(tmp_path, model))
    assert "2 tasks" in page.text
    assert "estimated" not in page.text
    assert "80.0 %" in page.text
