"""What a run leaves behind: history, files, trackers, progress, callbacks."""

from __future__ import annotations

import gc
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_nets import conv_net, dense_net, images, in_order, model_of, vectors

import weft
from weft.errors import ConfigError, TrainingError
from weft.training.progress import Display

COLUMNS = {
    "epoch",
    "phase",
    "loss",
    "penalty",
    "lr",
    "seconds",
    "val",
    "open_gates",
    "gates",
    "own_fraction",
}


def _fit(**options: Any) -> tuple[weft.MultiTaskModel, weft.History]:
    base = conv_net()
    model = model_of(base, weft.taps(base, warmup=1, harden=0.4))
    batches = in_order(images(16, 3, 1))
    data = {"a": (batches, batches), "b": batches}
    options = {"epochs": 3, "lr": 0.01, "progress": False, **options}
    return model, weft.fit(model, data, **options)


def test_the_log_has_a_json_line_for_each_task_and_epoch(tmp_path: Path) -> None:
    log = tmp_path / "new" / "history.jsonl"
    sizes: list[int] = []
    model, history = _fit(
        log=log, callbacks=[lambda _: sizes.append(log.stat().st_size if log.exists() else 0)]
    )
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["epoch"], r["task"]) for r in rows] == [(e, t) for e in range(3) for t in "ab"]
    for row in rows:
        task, epoch = row.pop("task"), row["epoch"]
        assert set(row) == COLUMNS
        assert row == history[task][epoch]
        assert row["loss"] > 0
        assert row["seconds"] > 0
        assert set(row["val"]) == ({"accuracy", "loss"} if task == "a" else set())
    assert sizes[0] == 0 < sizes[1] < sizes[2]  # written after each epoch
    assert model.tasks["a"].facts["history"] == history["a"]
    assert list(tmp_path.glob("new/.*")) == []


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    row = {"epoch": 0, "loss": 1.0, "val": {"auc": math.nan, "loss": math.inf}}
    weft.History({"a": [row]}).write(tmp_path / "h.jsonl")
    read = json.loads((tmp_path / "h.jsonl").read_text())
    assert read == {"task": "a", "epoch": 0, "loss": 1.0, "val": {"auc": None, "loss": None}}


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    _, history = _fit(trackers=["tensorboard"], log=tmp_path / "h.jsonl")
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert files
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    values = [e.value for e in events.Scalars("a/val/accuracy")]
    assert values == pytest.approx([r["val"]["accuracy"] for r in history["a"]])
    assert [e.step for e in events.Scalars("b/loss")] == [0, 1, 2]
    assert [e.value for e in events.Scalars("b/open_gates")] == [3.0, 3.0, 3.0]


def test_trackers_are_closed_when_a_run_fails(tmp_path: Path) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        _fit(trackers=["tensorboard"], log=tmp_path / "h.jsonl", callbacks=[fail])
    _fit(trackers=["tensorboard"], log=tmp_path / "h.jsonl")


@pytest.mark.filterwarnings("ignore:.*no supported trackers:UserWarning")
@pytest.mark.parametrize("tracker", ["tensorbord", "comet_ml"])
def test_unknown_and_missing_trackers_are_refused(tracker: str) -> None:
    with pytest.raises(ConfigError, match=tracker):
        _fit(trackers=[tracker])


def test_progress_prints_a_line_for_each_task_and_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    _, history = _fit(progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 6
    first = history["a"][0]
    assert lines[0].startswith(f"a: epoch 1/3  warm-up  loss {first['loss']:.4f}  accuracy")
    assert "open gates 3/3" in lines[0]
    assert lines[-1].startswith("b: epoch 3/3  harden")


def test_no_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    _fit(progress=False)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_many_tasks_share_a_line() -> None:
    row = {
        "phase": "train",
        "loss": 1.0,
        "val": {"accuracy": 0.5, "loss": 1.0},
        "open_gates": 1,
        "gates": 2,
        "seconds": 0.1,
    }
    out = io.StringIO()
    with Display(True, 2, 3, Console(file=out, width=200)) as display:
        display.begin(0, "train")
        display.step({"a": 1.0})
        display.end(0, {f"task{i}": row for i in range(9)})
    expected = (
        "9 tasks: epoch 1/2  train  loss 1.0000  mean accuracy 0.5000  open gates 9/18  0.1 s"
    )
    assert out.getvalue().splitlines() == [expected]


def test_a_terminal_gets_a_bar_with_loss_metric_and_gates() -> None:
    row = {
        "phase": "train",
        "loss": 1.0,
        "val": {"accuracy": 0.5},
        "open_gates": 1,
        "gates": 2,
        "seconds": 0.1,
    }
    out = io.StringIO()
    with Display(True, 2, 3, Console(file=out, width=120, force_terminal=True)) as display:
        display.begin(0, "train")
        display.step({"a": 1.25, "b": 0.75})
        display.end(0, {"a": row})
    assert "epoch 1/2 train" in out.getvalue()
    assert "loss 1.000" in out.getvalue()
    assert "accuracy 0.5000  open gates 1/2" in out.getvalue()


# --------------------------------------------------------------------- own accelerators


def test_an_own_accelerator_is_used() -> None:
    _, plain = _fit()
    _, given = _fit(accelerator=Accelerator())
    assert [r["loss"] for r in given["a"]] == [r["loss"] for r in plain["a"]]


def test_an_own_accelerator_keeps_its_business() -> None:
    with pytest.raises(ConfigError, match="trackers of its own"):
        _fit(accelerator=Accelerator(), trackers=["tensorboard"])
    with pytest.raises(ConfigError, match="differs from the accelerator's 'no'"):
        _fit(accelerator=Accelerator(), precision="bf16")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=4"):
        _fit(accelerator=Accelerator(gradient_accumulation_steps=4))


def test_a_precision_that_the_process_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision='fp8'"):
        _fit(precision="fp8")


# -------------------------------------------------------------------------------- files


@pytest.mark.parametrize("option", ["checkpoint", "log"])
def test_a_place_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("")
    calls: list[Any] = []
    with pytest.raises(TrainingError, match=r"cannot be (written|read)"):
        _fit(**{option: tmp_path / "file" / "inside"}, callbacks=[calls.append])
    assert calls == []


def test_a_log_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="It is a folder"):
        _fit(log=tmp_path)


def test_memory_does_not_grow_with_epochs() -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    batches = in_order(vectors(16, 3, 1))
    counts: list[int] = []

    def count(_: Any) -> None:
        gc.collect()
        counts.append(sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor)))

    data = dict.fromkeys("ab", (batches, batches))
    weft.fit(model, data, epochs=6, callbacks=[count], progress=False)
    assert counts[5] <= counts[2]
