"""Fleets over processes: the same results, no cell twice, and none lost when a process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import weft
from weft.comparing import compare, make_fleet, open_fleet, read_comparison, run_fleet
from weft.comparing.cells import Cell
from weft.comparing.locks import held

SCORES = ["task", "label", "seed", "cell", "val", "test", "val_loss", "test_loss", "own_bytes"]

DEADLY = """
import os
import signal

import numpy as np

def data():
    if os.environ.get("WEFT_TEST_MAY_DIE") != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    generator = np.random.default_rng(0)
    return {"x": generator.random((40, 3, 6, 6)), "y": generator.integers(0, 2, 40)}
"""


def start(config: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`weft compare` in a process group of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(Path(weft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "weft", "compare", str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("plain_path")
def test_two_processes_give_what_one_gives(content: dict[str, Any], tmp_path: Path) -> None:
    one = compare({**content, "output": str(tmp_path / "one")}, progress=False)
    two = compare(content, jobs=2, devices=["cpu"], progress=False)
    pd.testing.assert_frame_equal(one[SCORES], two[SCORES])
    assert set(two["device"]) == {"cpu"}


@pytest.mark.slow
@pytest.mark.usefixtures("plain_path")
def test_two_processes_that_need_one_trained_base_train_it_once(
    content: dict[str, Any], tmp_path: Path
) -> None:
    first = {"name": "full_finetune", "pretrain": {"epochs": 30}}
    content["methods"] = [first, {**first, "train": {"lr": 0.02}}]
    one = compare({**content, "output": str(tmp_path / "one")}, progress=False)
    two = compare(content, jobs=2, progress=False)
    pd.testing.assert_frame_equal(one[SCORES], two[SCORES])
    bases = list((tmp_path / "run" / "bases").iterdir())
    assert len(bases) == 1
    rows = (bases[0] / "pretraining" / "history.jsonl").read_text().splitlines()
    assert len(rows) == 30 * 2
    seconds = two.groupby("cell")["seconds"].min()
    assert (seconds > sum(json.loads(row)["seconds"] for row in rows[::2])).all()


@pytest.mark.slow
@pytest.mark.usefixtures("plain_path")
def test_a_process_that_dies_takes_only_its_cell_with_it(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.setenv("WEFT_TEST_MAY_DIE", str(os.getpid()))  # here, and in no other process
    deadly = {"data": f"python:{tmp_path / 'deadly.py'}:data", "classes": 2}
    content["tasks"] = {"deadly": deadly, **content["tasks"]}
    content["methods"] = ["linear_probe"]
    result = run_fleet(make_fleet(read_comparison(content)), jobs=2, progress=False)
    assert list(result.table["task"]) == ["bright", "red"]
    assert list(result.failed.values()) == [
        "Its process ended by signal 9, perhaps for lack of memory."
    ]


@pytest.mark.slow
def test_two_fleets_in_one_folder_never_run_a_cell_twice(
    content: dict[str, Any], tmp_path: Path
) -> None:
    log = tmp_path / "made.log"
    content["base"]["options"] = {"log": str(log)}
    content["seeds"] = 3
    config = tmp_path / "comparison.yaml"
    config.write_text(yaml.safe_dump(content))
    fleets = [start(config) for _ in range(2)]
    for fleet in fleets:
        said = fleet.communicate(timeout=300)[0].decode()
        assert fleet.returncode == 0, said
    cells = len(open_fleet(tmp_path / "run").cells)
    makers = Counter(log.read_text().split())
    assert len(makers) == 2
    # Each fleet makes the base once to find its cells, and every cell makes it once.
    assert sum(makers.values()) == 2 + cells


@pytest.mark.slow
def test_a_killed_fleet_goes_on_without_doing_anything_again(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["train"]["epochs"] = 40
    content["seeds"] = 2
    config = tmp_path / "comparison.yaml"
    config.write_text(yaml.safe_dump(content))
    run = tmp_path / "run"

    fleet = start(config, "--jobs", "2")
    deadline = time.monotonic() + 200
    while len(list(run.rglob("result.json"))) < 2 or not list(run.rglob("checkpoint.pt")):
        assert fleet.poll() is None, fleet.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fleet.send_signal(signal.SIGKILL)  # the parent alone: its workers must end by themselves
    fleet.wait()
    cells = open_fleet(run).cells
    while not all(free(cell.file("lock")) for cell in cells):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finished = {cell.name: written(cell) for cell in cells if cell.finished}
    assert 2 <= len(finished) < len(cells)
    begun = [cell for cell in cells if list(cell.folder.root.rglob("checkpoint.pt"))]
    assert any(not cell.finished for cell in begun)

    again = start(config, "--jobs", "2")
    said = again.communicate(timeout=300)[0].decode()
    assert again.returncode == 0, said
    assert all(cell.finished for cell in cells)
    for cell in cells:
        if cell.name in finished:
            assert written(cell) == finished[cell.name]
    whole = compare({**content, "output": str(tmp_path / "whole")}, progress=False)
    pd.testing.assert_frame_equal(open_fleet(run).table()[SCORES], whole[SCORES])


def written(cell: Cell) -> tuple[int, int]:
    """What changes whenever a cell's result is written."""
    status = cell.file("result.json").stat()
    return status.st_mtime_ns, status.st_ino


def free(lock: Path) -> bool:
    """Whether nobody holds a lock."""
    with held(lock) as mine:
        return mine


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_leaves_everything_to_go_on(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["train"]["epochs"] = 400
    config = tmp_path / "comparison.yaml"
    config.write_text(yaml.safe_dump(content))
    fleet = start(config, "--jobs", "2")
    while not list((tmp_path / "run").rglob("cell.jsonl")):
        assert fleet.poll() is None, fleet.communicate()[0].decode()
        time.sleep(0.02)
    os.killpg(fleet.pid, signal.SIGINT)
    said = fleet.communicate(timeout=60)[0].decode()
    assert fleet.returncode == 130, said
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
    assert all(free(cell.file("lock")) for cell in open_fleet(tmp_path / "run").cells)
