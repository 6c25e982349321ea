"""Several tasks on one table, Parquet, and warnings before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from weft.assembly import read_data, warn_of_data
from weft.comparing import read_comparison
from weft.config import Experiment
from weft.data import ArrayData, load, without_other_targets
from weft.errors import DataError, DataWarning
from weft.schema import validated


@pytest.fixture
def table() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    count = 60
    return pd.DataFrame(
        {
            "size": generator.normal(size=count),
            "colour": generator.choice(["red", "blue", "green"], count),
            "lucky": generator.random(count) < 0.5,
            "income": generator.choice(["low", "high"], count),
            "age": generator.integers(18, 90, count),
        }
    )


def inputs(data: Any) -> torch.Tensor:
    assert isinstance(data.train, ArrayData)
    assert isinstance(data.train.inputs, torch.Tensor)
    return data.train.inputs


def test_parquet_is_the_table_that_it_is_as_csv(table: pd.DataFrame, tmp_path: Path) -> None:
    table.loc[3, ["size", "colour"]] = None
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet", index=False)
    for target in ("income", "age"):
        one = load(f"csv:{tmp_path / 't.csv'}#target={target}")
        other = load(f"parquet:{tmp_path / 't.parquet'}#target={target}")
        assert one.classes == other.classes
        torch.testing.assert_close(inputs(one), inputs(other))
        assert isinstance(one.train, ArrayData)
        assert isinstance(other.train, ArrayData)
        assert torch.equal(one.train.targets, other.train.targets)


def test_what_is_no_parquet_table_is_refused(table: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("size,income\n1,low\n")
    with pytest.raises(DataError, match="not a Parquet file"):
        load(f"parquet:{tmp_path / 't.parquet'}#target=income")
    table["parts"] = [[1, 2]] * len(table)
    table.to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError, match="column parts holds list"):
        load(f"parquet:{tmp_path / 'n.parquet'}#target=income")
    table.drop(columns="parts").iloc[:0].to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="no rows"):
        load(f"parquet:{tmp_path / 'e.parquet'}#target=income")


def test_targets_of_other_tasks_are_no_inputs(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    table.to_csv(file, index=False)
    specs = {"a": f"csv:{file}#target=income", "b": f"csv:{file}#target=age&drop=lucky"}
    content = {
        "base": {"name": "python:net.py:make"},
        "tasks": {n: {"data": s} for n, s in specs.items()},
    }
    experiment = validated(Experiment, {**content, "method": "taps"})
    assert experiment.tasks["a"].data == f"csv:{file}#target=income&drop=age"
    assert experiment.tasks["b"].data == f"csv:{file}#target=age&drop=lucky,income"
    compared = read_comparison({**content, "methods": ["taps"]})
    assert {n: t.data for n, t in compared.tasks.items()} == {
        n: t.data for n, t in experiment.tasks.items()
    }
    # Reading is the same whether or not the other task is there any more, as in a single cell.
    kept = {"a": {"data": experiment.tasks["a"].data}}
    alone = validated(Experiment, {**content, "method": "taps", "tasks": kept})
    assert alone.tasks["a"].data == experiment.tasks["a"].data
    data = read_data(experiment)["a"]
    assert inputs(data).shape[1] == 1 + 3 + 2  # size, three colours, lucky or not


def test_other_tables_and_other_sources_stay() -> None:
    specs = {
        "a": "csv:one.csv#target=x",
        "b": "csv:two.csv#target=y",
        "c": "npz:one.csv#target=y",
        "d": "imagefolder:photos",
        "same": "csv:one.csv#target=x",
    }
    assert without_other_targets(specs) == specs


def test_problems_of_data_are_warned_of_once(tmp_path: Path) -> None:
    x = np.arange(40 * 3, dtype=np.float32).reshape(40, 3)
    y = np.arange(40) % 2
    np.savez(
        tmp_path / "leak.npz", x_train=x, y_train=y, x_val=x[:4], y_val=y[:4], x_test=x[:2] + 500,
        y_test=y[:2],
    )  # fmt: skip
    content = {
        "base": {"name": "python:net.py:make"},
        "method": "taps",
        "tasks": {n: {"data": f"npz:{tmp_path / 'leak.npz'}"} for n in ("a", "b")},
    }
    experiment = validated(Experiment, content)
    with pytest.warns(DataWarning) as caught:
        warn_of_data(experiment, read_data(experiment))
    assert [str(w.message) for w in caught] == [
        "Task 'a': 4 of 4 inputs of val also occur in train (samples of val = train: 0 = 0, 1 = 1, "
        "2 = 2 and 1 more)."
    ]
