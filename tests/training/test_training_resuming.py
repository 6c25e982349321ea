"""Checkpoints: a run that was interrupted, however, ends as one that was not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_run import EPOCHS, after, make_model, train
from torch import Tensor
from torch.utils.data import DataLoader
from training_nets import (
    assert_same_bits,
    conv_net,
    dense_net,
    everything,
    images,
    in_order,
    model_of,
    vectors,
)

import weft
from weft.errors import DataError, TrainingError
from weft.training import Epoch

Result = tuple[dict[str, Tensor], weft.History, dict[str, Any]]


def _result(model: weft.MultiTaskModel, history: weft.History) -> Result:
    facts = {task: model.tasks[task].facts["metrics"] for task in model.task_names}
    return everything(model), history, facts


@pytest.fixture(scope="module")
def uninterrupted() -> Result:
    torch.set_num_threads(1)
    model = make_model()
    return _result(model, train(model))


def _assert_same_run(left: Result, right: Result) -> None:
    assert_same_bits(left[0], right[0])
    assert left[1].best == right[1].best
    for task, rows in left[1].rows.items():
        others = right[1][task]
        assert [{**r, "seconds": 0} for r in rows] == [{**r, "seconds": 0} for r in others]
    assert left[2] == right[2]


def test_a_checkpoint_folder_changes_nothing(uninterrupted: Result, tmp_path: Path) -> None:
    model = make_model()
    _assert_same_run(_result(model, train(model, checkpoint=tmp_path)), uninterrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_a_killed_run_goes_on_bit_for_bit(uninterrupted: Result, tmp_path: Path, when: str) -> None:
    script = Path(__file__).with_name("interrupted_run.py")
    killed = subprocess.run(
        [sys.executable, str(script), str(tmp_path), when],
        env={"PATH": "", "PYTHONPATH": str(Path(weft.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    epochs: list[int] = []
    model = make_model()
    look = [lambda epoch: epochs.append(epoch.number)]
    history = train(model, checkpoint=tmp_path, callbacks=look)
    assert epochs == list(range({"reading": 5, "writing": 2}[when], EPOCHS))
    _assert_same_run(_result(model, history), uninterrupted)


@pytest.mark.parametrize("new_process", [True, False])
@pytest.mark.parametrize("where", ["callback", "step"])
@pytest.mark.parametrize("epoch", [0, 2, EPOCHS - 1])
def test_ctrl_c_leaves_the_last_complete_epoch_and_the_run_goes_on(
    uninterrupted: Result, tmp_path: Path, epoch: int, where: str, new_process: bool
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    states: list[dict[str, Tensor]] = []

    def look(now: Epoch) -> None:
        states.append(everything(now.model))
        if where == "callback" and now.number == epoch:
            interrupt()

    reading = after(16 + epoch * 48 + 30, interrupt) if where == "step" else lambda: None
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        train(model, reading, checkpoint=tmp_path, callbacks=[look])
    if states:
        assert_same_bits(everything(model), states[-1])
    assert len(states) == epoch + (where == "callback")
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for t in "ab" for p in model.tasks[t].parameters())
    if new_process:
        model = make_model()
    _assert_same_run(_result(model, train(model, checkpoint=tmp_path)), uninterrupted)


def test_an_error_in_the_first_epoch_leaves_the_start() -> None:
    base = conv_net()
    model = model_of(base, weft.full_finetune(base))
    before = everything(model)
    batches = in_order(images(24, 3, 1))
    batches[2] = [batches[2][0], batches[2][1] + 7]
    with pytest.raises(DataError, match=r"Task 'a': Labels are outside the classes: found 7..9"):
        weft.fit(model, {"a": batches}, epochs=2, progress=False)
    assert_same_bits(everything(model), before)


def test_training_of_shared_tensors_goes_on_in_the_same_session_and_in_a_new_one(
    tmp_path: Path,
) -> None:
    batches = in_order(images(24, 3, 1))
    data = dict.fromkeys("ab", (batches, batches))

    def run(model: weft.MultiTaskModel, **options: Any) -> weft.History:
        return weft.fit(model, data, epochs=4, lr=0.05, progress=False, **options)

    def stop(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    def make() -> weft.MultiTaskModel:
        base = conv_net()
        return model_of(base, weft.hard_sharing(base, batchnorm="follow"))

    whole = make()
    expected = _result(whole, run(whole))
    for name, fresh in (("one", False), ("two", True)):
        model = make()
        with pytest.raises(KeyboardInterrupt):
            run(model, checkpoint=tmp_path / name, callbacks=[stop])
        model = make() if fresh else model
        _assert_same_run(_result(model, run(model, checkpoint=tmp_path / name)), expected)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = make_model()
    first = _result(model, train(model, epochs=5, checkpoint=tmp_path))
    calls: list[Any] = []
    again = make_model()
    history = train(again, epochs=5, checkpoint=tmp_path, callbacks=[calls.append])
    assert calls == []
    _assert_same_run(_result(again, history), first)
    with pytest.raises(TrainingError, match=r"does not fit this model: .* final gates"):
        train(again, epochs=5, checkpoint=tmp_path)


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    base = dense_net()
    batches = in_order(vectors(16, 3, 1))

    def stop(epoch: Epoch) -> None:
        epoch.stop()

    for callbacks in ([stop], []):
        model = model_of(base, weft.full_finetune(base))
        history = weft.fit(
            model,
            {"a": batches},
            epochs=5,
            checkpoint=tmp_path,
            callbacks=callbacks,
            progress=False,
        )
        assert history.epochs == 1


# ---------------------------------------------------------------------- foreign, damaged


def _small(checkpoint: Path, classes: int = 3, base_seed: int = 0, **options: Any) -> Any:
    base = dense_net(base_seed)
    tasks = options.pop("tasks", ["a"])
    plan: Callable[..., Any] = options.pop("plan", weft.full_finetune)
    model = model_of(base, plan(base), tasks, classes)
    batches = in_order(vectors(16, 3, 1))
    options = {"epochs": 2, "progress": False, "checkpoint": checkpoint, **options}
    return weft.fit(model, dict.fromkeys(tasks, batches), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "lr was 0.01, now 0.5"),
        ({"epochs": 3}, "epochs was 2, now 3"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"steps": 1}, "steps was 2, now 1"),
        ({"optimizer": "adamw"}, "optimizer was 'sgd', now 'adamw'"),
        ({"tasks": ["b"]}, "tasks was"),
        ({"tasks": ["a", "b"]}, "tasks was"),
        ({"plan": weft.scale_bias}, "plans was .*full_finetune.* now .*scale_bias"),
        ({"base_seed": 1}, "base was"),
        ({"classes": 4}, "does not fit this model: 'head.linear.weight' of task:a was of shape"),
        ({"weights": {"a": 2.0}}, "weights was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _small(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match=message):
        _small(tmp_path, **change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    _small(tmp_path)
    file = tmp_path / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        torch.save({"epoch": 3}, file)
        data = bytearray(file.read_bytes())
    file.write_bytes(data)
    with pytest.raises(TrainingError, match=r"(is damaged|is no checkpoint).* start anew"):
        _small(tmp_path)


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, no file can be written out. (A limit of the process would hit the log.)"""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("option", ["checkpoint", "log"])
def test_a_full_disk_ends_the_run_at_its_last_complete_epoch(
    tmp_path: Path, option: str, fill_disk: Callable[[], None]
) -> None:
    base = conv_net()
    model = model_of(base, weft.full_finetune(base))
    states: list[dict[str, Tensor]] = []
    path = tmp_path / ("folder" if option == "checkpoint" else "log.jsonl")

    def look(epoch: Epoch) -> None:
        states.append(everything(epoch.model))
        if epoch.number == 2:
            fill_disk()

    with pytest.raises(TrainingError, match=r"cannot be written: .* Free space"):
        weft.fit(
            model,
            {"a": in_order(images(16, 3, 1))},
            epochs=9,
            lr=0.05,
            callbacks=[look],
            progress=False,
            **{option: path},  # type: ignore[arg-type]
        )
    assert_same_bits(everything(model), states[-1])
    assert len(states) == 3
    assert list(tmp_path.rglob("*.part")) == []
    if option == "log":
        assert len(path.read_text().splitlines()) == 2


def test_data_that_cannot_be_repeated_is_refused_with_a_checkpoint(tmp_path: Path) -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    loader = DataLoader(vectors(16, 3, 1), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(DataError, match="persistent_workers=False"):
        weft.fit(model, {"a": loader}, checkpoint=tmp_path, progress=False)


def test_workers_that_persist_are_refused_for_two_tasks() -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    loader = DataLoader(vectors(16, 3, 1), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(DataError, match="'a' and 'b' read one loader at a time"):
        weft.fit(model, {"a": loader, "b": loader}, epochs=1, progress=False)


def test_a_run_that_stopped_early_ends_alike_when_it_is_called_again(tmp_path: Path) -> None:
    """What it does at its end reads data, too."""
    kept = []
    for _ in range(2):
        base = conv_net()
        model = model_of(base, weft.taps(base, budget=0.4, warmup=0), tasks=["a"])
        order = torch.Generator()
        val = DataLoader(images(20, 3, 2), 8, shuffle=True, drop_last=True, generator=order)
        weft.fit(
            model,
            {"a": (in_order(images(24, 3, 1)), val)},
            epochs=8,
            checkpoint=tmp_path,
            callbacks=[lambda epoch: epoch.stop()],
            progress=False,
        )
        kept.append(model.tasks["a"].facts["metrics"]["val"])
    assert kept[0] == kept[1]
