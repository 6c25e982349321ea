"""Tasks over a base that was trained on all of them first: one cell, charged once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from weft.bank import Bank
from weft.bases import load_base
from weft.comparing import compare, make_fleet, read_comparison
from weft.comparing.attempts import attempt
from weft.config import check
from weft.core.sites import named_tensors
from weft.errors import ConfigError
from weft.experiment import train
from weft.planning import assemble, plan, train_plan
from weft.training import run as running

SCORES = ["task", "label", "val", "test", "own_bytes", "shared_bytes", "joint", "epochs"]
TAPS = {"warmup": 0, "harden": 0.5}


@pytest.fixture
def both(content: dict[str, Any]) -> dict[str, Any]:
    """TAPS over the base as it is, and at two prices over one that is trained first."""
    first = {"name": "taps", **TAPS, "pretrain": {"epochs": 2, "lr": 0.02}}
    content["methods"] = [
        {"name": "taps", **TAPS},
        {**first, "penalty": 0.5},
        {**first, "penalty": 0.6},
    ]
    return content


def bases(folder: Path) -> list[Path]:
    return sorted(folder.glob("bases/*/pretraining/base.safetensors"))


def test_it_is_what_weft_train_gives_and_the_base_is_trained_and_charged_once(
    both: dict[str, Any], tmp_path: Path
) -> None:
    frame = compare(both, progress=False)
    assert not frame.attrs["failed"]
    over = frame[frame["label"].str.contains("pretrain.epochs=2 pretrain.lr=0.02")]
    assert list(over["task"]) == ["bright", "red"] * 2
    assert over["joint"].all()
    assert over["cell"].nunique() == 2
    base, _ = load_base(both["base"]["name"])
    size = sum(t.numel() * t.element_size() for _, t in named_tensors(base))
    assert set(over["shared_bytes"]) == {size}
    assert (frame[~frame["joint"].astype(bool)]["shared_bytes"] == 0).all()
    assert len(bases(tmp_path / "run")) == 1
    assert not list((tmp_path / "run").rglob("checkpoint.pt"))
    assert (over["epochs"] == 2).all()

    alone = {key: both[key] for key in ("base", "tasks", "data", "train")}
    method = {"name": "taps", **TAPS, "penalty": 0.5}
    pretrain = {"epochs": 2, "lr": 0.02}
    elsewhere = str(tmp_path / "alone")
    experiment = check({**alone, "method": method, "pretrain": pretrain, "output": elsewhere})
    expected = train(experiment, progress=False)
    weights = load_file(Path(elsewhere) / "pretraining" / "base.safetensors")
    for name, tensor in load_file(bases(tmp_path / "run")[0]).items():
        assert torch.equal(tensor, weights[name])
    for _, row in over[over["label"].str.contains("penalty=0.5")].iterrows():
        assert row["test_loss"] == pytest.approx(expected[row["task"]]["metrics"]["test"]["loss"])
        assert row["own_bytes"] == expected[row["task"]]["own_bytes"]


def test_interrupted_anywhere_it_goes_on_to_the_same_result(
    both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both["methods"] = both["methods"][1:2]
    whole = compare({**both, "output": str(tmp_path / "whole")}, progress=False)
    original, calls = running.Run.one_epoch, []

    def interrupted(self: running.Run, *arguments: Any) -> Any:
        calls.append(self.epoch)
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(running.Run, "one_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(both, progress=False)
    frame = compare(both, progress=False)
    # The base's second epoch, the first task's two, the second task's first: each once more.
    assert calls == [0, 1, 1, 0, 1, 0, 0, 1]
    pd.testing.assert_frame_equal(frame[SCORES], whole[SCORES])


def test_epochs_that_are_told_count_up_to_all_of_them(both: dict[str, Any]) -> None:
    both["methods"] = both["methods"][1:]
    first, second = make_fleet(read_comparison(both)).cells
    assert first.epochs == second.epochs == 2 + 2 * 2
    told: list[int] = []
    assert attempt(first, told.append).end == "finished"
    assert told == [1, 2, 3, 4, 5, 6]
    told.clear()
    assert attempt(second, told.append).end == "finished"
    assert told == [3, 4, 5, 6]


def test_a_plan_takes_it_for_all_tasks_or_none_and_banks_hold_it(
    both: dict[str, Any], tmp_path: Path
) -> None:
    both["methods"] = [both["methods"][1], "linear_probe"]
    frame = compare(both, progress=False)
    over = frame["joint"].astype(bool)
    needs = int(frame[over]["shared_bytes"].iloc[0] + frame[over]["own_bytes"].sum())
    frame.loc[over, "val"] = 2.0
    assert {p.tasks for p in plan(frame, needs).chosen.picks} == {("bright", "red")}
    assert {p.label for p in plan(frame, needs - 1).chosen.picks} == {"linear_probe"}

    both["methods"] = both["methods"][:1]
    compare(both, progress=False)
    made = plan(tmp_path / "run", needs)
    file = made.write(tmp_path / "run" / "plan.yaml")
    base, _ = load_base(both["base"]["name"])
    kept = assemble(made, tmp_path / "kept")
    (tmp_path / "run" / "cells").rename(tmp_path / "away")
    trained = train_plan(file, tmp_path / "trained", progress=False)
    x = torch.rand(3, 3, 6, 6)
    models = [bank.load(base, "bright", "red").eval() for bank in (kept, trained)]
    for task in ("bright", "red"):
        assert torch.equal(models[0](x, task=task), models[1](x, task=task))
        assert not torch.equal(models[0].base[0].weight, base[0].weight)  # type: ignore[index,union-attr]
    assert Bank(tmp_path / "kept").verify() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pretrain": {"epochs": 1}}, "pretrain belongs to a method"),
        (
            {"methods": [{"name": "hard_sharing", "pretrain": {"epochs": 1}}]},
            "'hard_sharing' trains tensors that its tasks share anyway",
        ),
        ({"methods": [{"name": "taps", "pretrain": {"epoch": 1}}]}, "epochs"),
        ({"methods": [{"name": "taps", "pretrain": {"precision": "bf16"}}]}, "one for all methods"),
    ],
)
def test_what_does_not_go_together_is_refused(
    content: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_fleet(read_comparison({**content, **change}))
