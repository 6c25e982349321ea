"""A disk that is full stops a fleet cleanly, wherever it is noticed, and nothing is lost."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from weft.comparing import compare
from weft.errors import TrainingError

SCORES = ["task", "label", "cell", "val", "test", "val_loss", "own_bytes"]


@pytest.mark.parametrize(
    ("place", "finished"),
    [
        ("*/checkpoint.pt", 1),
        ("*/cell.jsonl", 1),
        ("*/bank/tasks/*", 1),
        ("*/bank/bank.json", 1),
        ("*/correct.safetensors", 1),
        ("*/result.json", 1),
        ("*/results.csv", 2),
        ("*/comparison.json", 0),
    ],
)
def test_whatever_cannot_be_written_stops_all_and_is_mended_by_space(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str,
    finished: int,
) -> None:  # fmt: skip
    """``finished`` cells are there before the file at ``place`` cannot be written."""
    content["methods"] = ["scale_bias"]
    whole = compare({**content, "output": str(tmp_path / "whole")}, progress=False)
    stopped: list[str] = []

    def full(name: str) -> Any:
        original = getattr(os, name)

        def move(source: Any, target: Any, **more: Any) -> None:
            done = len(list(Path(content["output"]).rglob("result.json")))
            if fnmatch.fnmatch(str(target), place) and done >= finished:
                stopped.append(str(target))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            original(source, target, **more)

        return move

    with monkeypatch.context() as patched:
        for name in ("replace", "rename"):
            patched.setattr(os, name, full(name))
        with pytest.raises(TrainingError, match=r"[Ff]ree some space|Free space"):
            compare(content, progress=False)
    assert stopped
    run = Path(content["output"])
    kept = {p: p.stat().st_mtime_ns for p in run.rglob("result.json")}
    assert len(kept) == finished
    assert not list(run.rglob("*.part"))
    frame = compare(content, progress=False)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    pd.testing.assert_frame_equal(frame[SCORES], whole[SCORES])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    content: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    whole = compare({**content, "output": str(tmp_path / "whole")}, progress=False)
    content["output"] = str(small_disk / "run")
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1 << 20) - 4096 * 30))  # enough left for a cell or so
    with pytest.raises(TrainingError, match=r"[Ff]ree some space|Free space"):
        compare(content, progress=False)
    kept = {p: p.stat().st_mtime_ns for p in small_disk.rglob("result.json")}
    assert len(kept) < 3
    filler.unlink()
    frame = compare(content, progress=False)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    pd.testing.assert_frame_equal(frame[SCORES], whole[SCORES])
