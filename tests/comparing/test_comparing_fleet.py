"""A fleet in one process: everything measured, nothing done twice, failures told at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weft.bank import Bank
from weft.bases import load_base
from weft.comparing import compare, make_fleet, read_comparison, run_fleet
from weft.comparing import running as running_cells
from weft.comparing.tables import COLUMNS, write_parquet
from weft.errors import DataError, MissingExtra
from weft.training import run as running

SCORES = ["val", "test", "val_loss", "test_loss", "own_bytes", "shared_bytes"]


def results(folder: Path) -> dict[str, int]:
    """When each result was written."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("result.json")}


def test_the_table_holds_everything_and_a_second_run_trains_nothing(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = compare(content, progress=False)
    assert list(frame["task"]) == ["bright", "red", "bright", "red"]
    assert set(COLUMNS) <= set(frame.columns)
    assert {"val_accuracy", "test_accuracy", "val_loss", "test_loss"} <= set(frame.columns)
    assert (frame["val"] == frame["val_accuracy"]).all()
    known = [c for c in COLUMNS if c != "device_memory_bytes"]
    assert frame[known].notna().all().all()
    joint = frame[frame["joint"]]
    assert joint["cell"].nunique() == 1
    assert (joint["shared_bytes"] > 0).all()
    assert (frame[~frame["joint"]]["shared_bytes"] == 0).all()
    assert set(joint["train"]) == {'{"lr": 0.02}'}
    assert (frame["base_bytes"] == (4 * 27 + 4 * 36 + 8 * 4) * 4 + 2 * 8).all()
    assert (frame["latency_ms_per_row"] > 0).all()
    assert (frame["peak_memory_bytes"] > 2**20).all()

    folder = tmp_path / "run"
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet")[SCORES],
                                  frame[SCORES])  # fmt: skip
    assert len(pd.read_csv(folder / "results.csv")) == 4
    assert not list(folder.rglob("checkpoint.pt"))

    def never(*_: object) -> None:
        raise AssertionError("a finished cell was run again")

    before = results(folder)
    monkeypatch.setattr(running_cells, "fit", never)
    again = compare(content, progress=False)
    assert results(folder) == before
    pd.testing.assert_frame_equal(again, frame)


def test_a_cell_keeps_its_bundles(content: dict[str, Any], tmp_path: Path) -> None:
    frame = compare({**content, "methods": ["scale_bias"]}, progress=False)
    row = frame.iloc[0]
    bank = Bank(tmp_path / "run" / "cells" / row["cell"] / "bank", create=False)
    model = bank.load(load_base(content["base"]["name"])[0])
    assert model.ledger("bright").own_bytes == row["own_bytes"]
    files = (bank.path / "tasks" / "bright").iterdir()
    assert row["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert bank.info("bright")["facts"]["metrics"]["test"]["accuracy"] == row["test"]


def test_an_interrupted_cell_goes_on_to_the_same_result(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare({**content, "output": str(tmp_path / "whole")}, progress=False)
    original, calls = running.Run.one_epoch, []

    def interrupted(self: running.Run, *arguments: Any) -> Any:
        calls.append(self.epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(running.Run, "one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(content, progress=False)
    assert len(pd.read_csv(tmp_path / "run" / "results.csv")) == 1
    calls.append(None)
    frame = compare(content, progress=False)
    assert calls[5:] == [1, 0, 1]  # the second epoch of the second cell, and the third cell
    pd.testing.assert_frame_equal(frame[SCORES], whole[SCORES])


def test_failed_cells_are_told_and_stop_no_others(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = ["depthwise_patch", "linear_probe"]
    fleet = make_fleet(read_comparison(content))
    result = run_fleet(fleet, progress=False)
    assert list(result.table["label"]) == ["linear_probe"] * 2
    assert result.waiting == 2
    assert all("depthwise convolutions" in reason for reason in result.failed.values())
    name = next(iter(result.failed))
    folder = tmp_path / "run" / "cells" / name
    assert json.loads((folder / "failure.json").read_text())["cell"] == name
    assert "Traceback" in (folder / "log.txt").read_text()
    assert compare(content, progress=False).attrs["failed"] == dict(result.failed)


def test_any_error_of_a_cell_is_a_failure_that_ends_when_it_is_mended(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["methods"] = ["linear_probe"]

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patched:
        patched.setattr(running_cells, "evaluate", broken)
        result = run_fleet(make_fleet(read_comparison(content)), progress=False)
    assert set(result.failed.values()) == {"ZeroDivisionError: division by zero"}
    mended = run_fleet(make_fleet(read_comparison(content)), progress=False)
    assert not mended.failed
    assert not list(mended.files[0].parent.rglob("failure.json"))


def test_a_cell_that_another_process_runs_is_left_to_it(content: dict[str, Any]) -> None:
    from weft.comparing.locks import held

    fleet = make_fleet(read_comparison(content))
    with held(fleet.cells[1].file("lock")):
        result = run_fleet(fleet, progress=False)
    assert result.elsewhere == (fleet.cells[1].name,)
    assert result.waiting == 1
    assert len(result.table) == 3


def test_two_shards_make_the_whole_table(content: dict[str, Any]) -> None:
    first = compare(content, shard=(1, 2), progress=False)
    assert len(first) == 3
    assert len(compare(content, shard=(2, 2), progress=False)) == 4


def test_data_is_read_before_any_work(content: dict[str, Any], tmp_path: Path) -> None:
    content["tasks"]["red"]["data"] = f"npz:{tmp_path / 'rad.npz'}"
    with pytest.raises(DataError, match="Close matches: red"):
        compare(content, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_split_without_rows_is_told_before_any_work(
    content: dict[str, Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "red.npz", x=np.zeros((1, 3, 6, 6), np.uint8), y=np.zeros(1, np.int64))
    with pytest.raises(DataError, match=r"tasks\.red\.data: .* has no rows for val \(train 1, "):
        compare(content, progress=False)
    assert not (tmp_path / "run").exists()


def test_seeds_share_splits_and_base_and_differ_in_training(content: dict[str, Any]) -> None:
    content |= {"methods": ["scale_bias"], "seeds": 2}
    frame = compare(content, progress=False).set_index(["task", "seed"])
    assert frame.loc[("red", 0), "val_loss"] != frame.loc[("red", 1), "val_loss"]


def test_a_regression_is_scored_by_its_own_metric(content: dict[str, Any], tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 3, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "level.npz", x=x, y=x.mean((1, 2, 3)))
    content["tasks"] = {"level": {"data": f"npz:{tmp_path / 'level.npz'}", "kind": "regression"}}
    content["methods"] = ["linear_probe"]
    row = compare(content, progress=False).iloc[0]
    assert not row["higher_is_better"]
    assert row[f"val_{row['metric']}"] == row["val"]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"weft-share\[parquet\]"):
        write_parquet(tmp_path / "t.parquet", pd.DataFrame())
