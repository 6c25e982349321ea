"""The page in a real browser: choose tasks, drop an image, see the bars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import weft
from serving.banks import SHAPE, disturb, images, make_base
from weft.bank import Bank
from weft.data import Preprocessing
from weft.data.images import decode_one
from weft.serving import Server
from weft.serving.inputs import InputSpec
from weft.serving.settings import Settings

pytest.importorskip("uvicorn")
from serving.browser import CHROMIUM, Browser
from serving.processes import ServerThread
from weft.serving.http import create_app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

HOSTILE = "<img src=x onerror=document.title='hacked'>"
PIXELS = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)


class World:
    """A bank of tasks of several kinds, an image, and what each task says about it."""

    def __init__(self, folder: Path) -> None:
        base = make_base()
        torch.manual_seed(0)
        model = weft.MultiTaskModel(base, weft.taps(base), example=images(2))
        model.add_task("animals", weft.Classification(["cat", HOSTILE, "dog & bone"]))
        model.add_task("flowers", weft.Classification(12), sharing=weft.scale_bias(base))
        model.add_task("labels", weft.Binary(["red", "round"]), sharing=weft.linear_probe(base))
        model.add_task("age", weft.Regression(), sharing=weft.linear_probe(base))
        for i in range(8):
            task = weft.Classification(2)
            model.add_task(f"sensor {i}", task, sharing=weft.scale_bias(base))
        disturb(model)
        self.bank = Bank(folder / "bank")
        self.bank.save(model)
        self.model = self.bank.load(base).eval()
        self.image = folder / "a picture.png"
        pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.image)
        row = torch.from_numpy(decode_one(self.image, 6).copy()).permute(2, 0, 1)[None]
        self.x = PIXELS(row)

    def app(self, **settings: Any) -> Any:
        spec = InputSpec(shape=SHAPE, image_size=6, preprocessing=PIXELS)
        server = Server(self.bank, make_base())
        return create_app(server, Settings(inputs=spec, max_delay=1.0, **settings))

    def chances(self, task: str) -> list[float]:
        """The probabilities that the page must show, the greatest first."""
        logits = self.model(self.x, task=task)[0].detach()
        kind = self.model.tasks[task].task.spec["kind"]
        chances = logits.softmax(0) if kind == "classification" else logits.sigmoid()
        return sorted(chances.tolist(), reverse=True)[:5]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with ServerThread(world.app()) as served:
        yield served.url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


def bars(browser: Browser) -> dict[str, list[list[Any]]]:
    """By card, each bar's name, percentage and width."""
    return dict(
        browser.run(
            "[...document.querySelectorAll('.card')].map(c => [c.querySelector('h3').innerText,"
            "[...c.querySelectorAll('li')].map(b => [b.querySelector('.name').innerText,"
            "b.querySelector('.num').innerText,"
            "b.querySelector('.fill').getBoundingClientRect().width /"
            "b.querySelector('.track').getBoundingClientRect().width])])"
        )
    )


def opened(browser: Browser, url: str) -> None:
    browser.events.clear()
    browser.open(url)
    browser.wait_for("document.querySelectorAll('#list li').length == 12")
    browser.wait_for("document.querySelectorAll('#map tbody tr').length == 6")


def test_an_image_is_dropped_and_the_bars_are_seen(
    world: World, browser: Browser, url: str
) -> None:
    opened(browser, url)
    browser.drop_file("#drop", world.image)
    browser.wait_for("document.querySelectorAll('.card').length == 6")
    found = bars(browser)
    for task in ("animals", "flowers", "labels", "sensor 0"):
        expected = world.chances(task)
        assert len(found[task]) == len(expected)
        for (_, text, width), chance in zip(found[task], expected, strict=True):
            assert text == f"{100 * chance:.1f} %"
            assert width == pytest.approx(chance, abs=0.01)
    assert {name for name, _, _ in found["animals"]} == {"cat", HOSTILE, "dog & bone"}
    assert browser.run("document.title") == "weft: tasks on one base"
    assert browser.run("document.querySelectorAll('.card img').length") == 0
    assert found["age"] == []
    age = float(world.model(world.x, task="age")[0].detach())
    shown = float(browser.run("document.querySelectorAll('.card p')[0].innerText"))
    assert shown == pytest.approx(age, rel=1e-3)
    assert "6 tasks in" in browser.run("document.getElementById('time').innerText")
    assert browser.complaints() == []
    assert all(r.startswith((url, "blob:" + url)) for r in browser.requests())


def test_the_map_shows_what_each_task_owns(world: World, browser: Browser, url: str) -> None:
    opened(browser, url)
    rows = browser.run(
        "[...document.querySelectorAll('#map tbody tr')].map(r => [r.cells[0].innerText,"
        "r.querySelectorAll('.own').length, r.querySelectorAll('.own, .cell').length])"
    )
    for name, own, layers in rows:
        sites: dict[str, int] = {}
        for row in world.bank.ledger(name).rows:
            sites[row.site] = sites.get(row.site, 0) + row.own
        assert layers == len(sites)
        assert own == sum(map(bool, sites.values()))
    assert {own for _, own, _ in rows} == {0, 1, 3}


def test_tasks_are_filtered_and_chosen_and_numbers_can_be_sent(
    world: World, browser: Browser, url: str
) -> None:
    opened(browser, url)
    browser.run("document.getElementById('none').click()")
    assert browser.run("document.getElementById('run').disabled")
    browser.run(
        "document.getElementById('filter').value = 'SENS';"
        "document.getElementById('filter').dispatchEvent(new Event('input'));"
        "document.getElementById('all').click()"
    )
    assert browser.run("document.querySelectorAll('#list li').length") == 8
    assert "8 of 12 chosen" in browser.run("document.getElementById('count').innerText")
    row = world.x[0].tolist()
    browser.run(
        f"document.getElementById('rows').value = '{row}';"
        "document.getElementById('rows').dispatchEvent(new Event('input'));"
        "document.getElementById('run').click()"
    )
    browser.wait_for("document.querySelectorAll('.card').length == 8")
    assert list(bars(browser)) == [f"sensor {i}" for i in range(8)]
    browser.run(
        "document.getElementById('rows').value = '[1, 2]';document.getElementById('run').click()"
    )
    shown = browser.wait_for(
        "!document.getElementById('problem').hidden && document.getElementById('problem').innerText"
    )
    assert "expected rows of shape [3, 6, 6]" in shown


def test_the_page_works_by_keyboard(world: World, browser: Browser, url: str) -> None:
    opened(browser, url)
    seen = []
    for _ in range(30):
        browser.press("Tab")
        seen.append(browser.run("document.activeElement.id || document.activeElement.type"))
        if seen[-1] == "checkbox" and seen.count("checkbox") == 1:
            browser.press(" ")
            assert "5 of 12" in browser.run("document.getElementById('count').innerText")
        if seen[-1] == "file":
            break
    assert seen[-1] == "file"
    assert {"filter", "all", "none", "checkbox"} <= set(seen)
    assert browser.run("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    browser.choose_file("#file", world.image)
    browser.wait_for("document.querySelectorAll('.card').length == 5")


def test_a_token_is_asked_for(world: World, browser: Browser) -> None:
    with ServerThread(world.app(token="sesame")) as served:
        browser.open(served.url)
        browser.wait_for("!document.getElementById('unlock').hidden")
        assert browser.run("document.getElementById('app').hidden")
        browser.run(
            "document.getElementById('token').value = 'sesame';"
            "document.getElementById('unlock').requestSubmit()"
        )
        browser.wait_for("document.querySelectorAll('#list li').length == 12")
        browser.choose_file("#file", world.image)
        browser.wait_for("document.querySelectorAll('.card').length == 6")


@pytest.mark.parametrize("width", [1280, 800, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_can_be_read(
    width: int, dark: bool, world: World, browser: Browser, url: str, tmp_path: Path
) -> None:
    browser.resize(width, 900, dark=dark)
    try:
        opened(browser, url)
        browser.choose_file("#file", world.image)
        browser.wait_for("document.querySelectorAll('.card').length == 6")
        assert browser.run("document.documentElement.scrollWidth") <= width
        paper, ink, own = browser.run(
            "(s => ['--paper', '--ink', '--own'].map(n => s.getPropertyValue(n)))"
            "(getComputedStyle(document.documentElement))"
        )
        assert (luminance(paper) < 0.1) == dark
        assert contrast(ink, paper) > 10
        assert contrast(own, paper) > 4.5
        browser.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert shot.width == width
            assert len(np.unique(np.asarray(shot.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    finally:
        browser.resize(1280, 900)


def luminance(colour: str) -> float:
    """Relative luminance of a colour ``#rrggbb``."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG measures it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
