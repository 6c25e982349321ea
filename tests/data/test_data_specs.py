"""Specs: prefixes, options, paths, and functions of the user's own."""

import sys
from pathlib import Path

import pytest

from weft.data import READERS, ArrayData, load
from weft.data.request import split_spec
from weft.errors import DataError, MissingExtra


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("imagefoldr:x", r"unknown prefix 'imagefoldr'.*Close matches: imagefolder"),
        ("some/folder", r"expected one of: imagefolder:DIR, csv:FILE"),
        ("npz:", r"expected one of"),
        ("npz:a.npz#targte=y", r"found option targte; .*Close matches: target"),
        ("imagefolder:a#target=y", r"found option target; expected one of: nothing"),
    ],
)
def test_a_wrong_spec_says_what_is_expected(spec: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(spec)


@pytest.mark.parametrize("prefix", ["imagefolder", "csv", "npz"])
def test_a_missing_path_shows_what_is_there(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"holds: flowers, notes.txt.*Close matches: flowers"):
        load(f"{prefix}:{tmp_path / 'flower'}")
    with pytest.raises(DataError, match=r"holds: flowers, notes.txt"):
        load(f"{prefix}:{tmp_path / 'deep' / 'down' / 'x'}")


def test_a_folder_is_no_file_and_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        load(f"csv:{tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        load(f"imagefolder:{tmp_path / 'file'}")


def test_options_follow_the_last_hash() -> None:
    assert split_spec("a#1/b.csv#target=x=y&kind=number") == (
        "a#1/b.csv",
        {"target": "x=y", "kind": "number"},
    )
    assert split_spec("a#1/b.csv") == ("a#1/b.csv", {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"val": 0.6, "test": 0.5}, "a sum below 1"),
        ({"val": -0.1}, "expected both >= 0"),
        ({"image_size": 0}, "image_size=0; expected at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load("csv:any.csv", **arguments)  # type: ignore[arg-type]


def test_every_reader_says_its_form() -> None:
    assert all(reader.form.startswith(f"{prefix}:") for prefix, reader in READERS.items())


SOURCE = """
import numpy as np, torch
from torch.utils.data import IterableDataset, TensorDataset
from weft.data import ArrayData, TaskData

def sets(rows):
    return TensorDataset(torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64))

def pair():
    return sets(4), sets(2)

def triple():
    return sets(4), None, sets(3)

def task():
    return TaskData(sets(1), classes=("one",))

def arrays():
    return {"x": np.random.randn(40, 3), "label": np.arange(40) % 4}

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def stream():
    return sets(1), Stream()

def wrong():
    return [1, 2]

def number():
    return 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(SOURCE)
    return file


def test_a_function_may_return_sets_or_a_task(source: Path) -> None:
    pair = load(f"python:{source}:pair")
    assert {name: len(s) for name, s in pair.splits.items()} == {"train": 4, "val": 2}  # type: ignore[arg-type]
    assert list(load(f"python:{source}:triple").splits) == ["train", "test"]
    assert load(f"python:{source}:task").classes == ("one",)


def test_a_function_may_return_arrays(source: Path) -> None:
    data = load(f"python:{source}:arrays", val=0.1, test=0.1)
    assert data.classes == ("0", "1", "2", "3")
    assert isinstance(data.val, ArrayData)
    assert sorted(data.val.labels.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("pears", "found function pears; .*Close matches: pair"),
        ("stream", "Stream is not a map-style"),
        ("wrong", "the function returned int, int; expected a TaskData"),
        ("number", "the function returned int; expected a TaskData"),
        ("not-a-name", "Name a function after a colon"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(source: Path, function: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(f"python:{source}:{function}")


def test_a_missing_source_file_shows_what_is_there(source: Path) -> None:
    with pytest.raises(DataError, match=r"holds: own\.py"):
        load(f"python:{source.parent / 'mine.py'}:pair")


def test_image_size_without_effect_is_refused(source: Path) -> None:
    with pytest.raises(DataError, match="image_size=8 has no effect"):
        load(f"python:{source}:arrays", image_size=8)


def test_the_hub_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"weft-share\[hf\]"):
        load("hf:mnist")
