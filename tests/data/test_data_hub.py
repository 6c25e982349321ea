"""Hugging Face data sets: with the library where it is installed, and with a stand-in."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from weft.data import ArrayData, load
from weft.errors import DataError


def stored(split: object) -> ArrayData:
    assert isinstance(split, ArrayData)
    return split


# The part of the library that the reader uses, for machines that do not have it.


@dataclass
class Value:
    dtype: str


@dataclass
class ClassLabel:
    names: list[str]


@dataclass
class Image:
    decode: bool = True


class Columns:
    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def cast_column(self, name: str, feature: Image) -> "Columns":
        assert not feature.decode
        assert name in self.columns
        return self


class DatasetDict(dict[str, Columns]):
    pass


Install = Callable[[Any], str]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    def put(found: Any) -> str:
        module = ModuleType("datasets")
        for name, value in {
            "Value": Value, "ClassLabel": ClassLabel, "Image": Image, "DatasetDict": DatasetDict,
            "load_from_disk": lambda _path: found,
        }.items():  # fmt: skip
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return f"hf:{tmp_path}"

    return put


def pictures(encoded: Callable[..., bytes], shades: list[int]) -> Columns:
    cells = [{"bytes": encoded(shade), "path": None} for shade in shades]
    labels = [shade % 2 for shade in shades]
    return Columns(
        {"image": cells, "label": labels},
        {"image": Image(), "label": ClassLabel(["even", "odd"])},
    )


def test_images_and_class_names(install: Install, encoded: Callable[..., bytes]) -> None:
    found = DatasetDict(
        train=pictures(encoded, [10, 21, 30, 41]), validation=pictures(encoded, [90, 101])
    )
    data = load(install(found))
    assert data.classes == ("even", "odd")
    assert {name: len(stored(s)) for name, s in data.splits.items()} == {"train": 4, "val": 2}
    x, y = stored(data.val)[1]
    assert isinstance(x, torch.Tensor)
    assert (int(x[0, 0, 5]), int(y)) == (101, 1)


def test_tokens_are_padded_and_masked(install: Install) -> None:
    found = Columns(
        {"input_ids": [[5, 6], [7], [8, 9, 4]], "labels": [0, 1, 1]},
        {"input_ids": Value("list"), "labels": Value("int64")},
    )
    data = load(install(found), val=0, test=0)
    inputs = stored(data.train).inputs
    assert isinstance(inputs, dict)
    assert inputs["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert data.input_shape is None


def test_a_lone_train_split_is_split(install: Install) -> None:
    columns = {"a": [float(i) for i in range(40)], "y": [i % 2 for i in range(40)]}
    features = {"a": Value("float32"), "y": Value("int64")}
    data = load(install(DatasetDict(train=Columns(columns, features))), val=0.1, test=0.1)
    assert [len(stored(s)) for s in data.splits.values()] == [32, 4, 4]
    assert data.input_shape == (1,)


TEXTS = Columns(
    {"text": ["a", "b"], "n": [1, 2], "label": [0, 1], "odd": [None, {}]},
    {"text": Value("string"), "n": Value("int64"), "label": Value("int64"), "odd": Value("null")},
)


@pytest.mark.parametrize(
    ("found", "options", "says"),
    [
        (TEXTS, "", "found columns text, odd that are neither images nor single numbers"),
        (TEXTS, "#input=text", "Tokenize texts"),
        (TEXTS, "#input=txt", "found input=txt; .*Close matches: text"),
        (TEXTS, "#target=lable", "found target=lable; .*Close matches: label"),
        (TEXTS, "#target=odd", "column odd holds NoneType"),
        (Columns({"a": [1]}, {"a": Value("int64")}), "", "Add #target=COLUMN"),
        (DatasetDict(dev=TEXTS), "", "found splits dev; expected one of train"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    install: Install, found: Any, options: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load(install(found) + options)


def test_one_column_can_be_chosen(install: Install) -> None:
    assert load(install(TEXTS) + "#input=n", val=0, test=0).input_shape == (1,)


def test_failures_of_the_library_are_explained(install: Install, tmp_path: Path) -> None:
    install(None)
    with pytest.raises(DataError, match=r"there is no folder .*no/such, and the hub data set"):
        load(f"hf:{tmp_path}/no/such")


def test_the_library_itself(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    names = datasets.ClassLabel(names=["no", "yes"])

    def part(shades: list[int]) -> Any:
        features = datasets.Features({"img": datasets.Image(), "label": names})
        cells = [{"bytes": encoded(shade), "path": None} for shade in shades]
        return datasets.Dataset.from_dict(
            {"img": cells, "label": [shade % 2 for shade in shades]}, features=features
        )

    both = datasets.DatasetDict(train=part([10, 21, 30, 41]), test=part([50, 61]))
    both.save_to_disk(str(tmp_path / "pictures"))
    data = load(f"hf:{tmp_path / 'pictures'}", val=0)
    assert data.classes == ("no", "yes")
    assert [len(stored(s)) for s in data.splits.values()] == [4, 2]
    x, y = stored(data.test)[1]
    assert isinstance(x, torch.Tensor)
    assert (int(x[0, 0, 5]), int(y)) == (61, 1)

    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "label": [0, 1]})
    tokens.save_to_disk(str(tmp_path / "tokens"))
    inputs = stored(load(f"hf:{tmp_path / 'tokens'}", val=0, test=0).train).inputs
    assert isinstance(inputs, dict)
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]

    table = datasets.Dataset.from_dict({"a": [0.5, 2.0], "b": [1, 2], "y": [0.1, 0.2]})
    table.save_to_disk(str(tmp_path / "table"))
    regression = load(f"hf:{tmp_path / 'table'}", val=0, test=0)
    assert (regression.classes, regression.input_shape) == (None, (2,))
