"""Merge by the command line."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import weft
from weft.bases import load_base
from weft.merging import concrete


def test_merged_tasks_are_a_bank_and_a_base(experiment: Path, weft_command) -> None:
    assert weft_command("train", experiment, "--set", "method=full_finetune", "--json")[0] == 0
    override = ("--set", "method=full_finetune")
    merged = experiment.parent / "merged"
    code, out, err = weft_command("merge", experiment, "-o", merged, *override, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert set(told["scores"]) == {str(round(0.1 * i, 1)) for i in range(1, 11)}
    best = max(sum(scores.values()) for scores in told["scores"].values())
    assert sum(told["scores"][str(told["scale"])].values()) == best

    base, _ = load_base(
        f"python:{experiment.parent / 'net.py'}:make", weights=merged / "base.safetensors"
    )
    model = weft.Bank(merged / "bank").load(base).eval()
    assert set(model.task_names) == {"bright", "red"}
    before, _ = load_base(f"python:{experiment.parent / 'net.py'}:make")
    tasks = weft.Bank(experiment.parent / "run" / "bank").load(before)
    again = weft.merge(tasks, scale=told["scale"]).model.eval()
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(model(x, task="red"), again(x, task="red"))

    code, _, err = weft_command("merge", experiment, "-o", merged, *override)
    assert code == 2
    assert "Give a new folder" in err


def trained(experiment: Path, weft_command, *overrides: str) -> tuple[str, ...]:
    """Train quickly, and give the overrides that say so."""
    given = ("--set", "method=full_finetune", "--set", "train.epochs=1", *overrides)
    code, _, err = weft_command("train", experiment, *given, "--json")
    assert code == 0, err
    return given


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(concrete, steps=3)
    monkeypatch.setattr(sys.modules["weft.merging.merge"], "concrete", few)


@pytest.mark.usefixtures("short")
def test_a_mask_is_learned_on_validation_inputs(experiment: Path, weft_command) -> None:
    override = trained(experiment, weft_command)
    merged = experiment.parent / "merged"
    options = ("--how", "concrete", *override)
    code, out, err = weft_command("merge", experiment, "-o", merged, *options)
    assert code == 0, err
    assert "concrete task_arithmetic, scale 0.3" in out
    assert "learned the mask in 3 steps" in err
    assert set(weft.Bank(merged / "bank").tasks()) == {"bright", "red"}

    code, out, err = weft_command(
        "merge", experiment, "-o", merged.with_name("b"), *options, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["how"] == "concrete task_arithmetic"
    assert "learned the mask" not in err


def test_a_collapse_is_printed(
    experiment: Path, weft_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = trained(experiment, weft_command)
    few = partial(concrete, steps=1)
    monkeypatch.setattr(sys.modules["weft.merging.merge"], "concrete", few)
    said = ("Predictions collapsed.",)
    monkeypatch.setattr(sys.modules["weft.merging.concrete"], "collapse", lambda *_: said)
    merged = experiment.parent / "merged"
    code, out, err = weft_command("merge", experiment, "-o", merged, "--how", "concrete", *override)
    assert code == 0, err
    assert "warning: Predictions collapsed." in out


def test_the_table_shows_what_chose(experiment: Path, weft_command) -> None:
    override = trained(experiment, weft_command)
    merged = experiment.parent / "merged"
    code, out, err = weft_command("merge", experiment, "-o", merged, "--how", "ties", *override)
    assert code == 0, err
    assert "task arithmetic, mean" in out
    one = experiment.parent / "one"
    options = ("--task", "red", "--how", "ties", *override)
    code, out, err = weft_command("merge", experiment, "-o", one, *options, "--json")
    assert code == 0, err
    assert json.loads(out)["scale"] == 1.0  # one task merged is that task
    average = ("--how", "average", "--scale", "0.5", *override)
    code, out, err = weft_command(
        "merge", experiment, "-o", experiment.parent / "c", *average, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["scale"] == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--how", "soup", "--scale", "1"), "'ties' or 'concrete', found 'soup'"),
        (("--scale", "big"), "a number or choose"),
        (("--task", "rad"), "no stored task 'rad'. Close matches: red"),
        (("--density", "2"), "density"),
        (("--how", "concrete", "--scale", "0.3"), "no use for scale"),
        (("--how", "concrete", "--density", "0.3"), "no use for density"),
    ],
)
def test_wrong_merges_are_refused_and_write_nothing(
    experiment: Path, weft_command, options: tuple[str, ...], said: str
) -> None:
    override = ("--set", "method=linear_probe", "--set", "train.epochs=1")
    assert weft_command("train", experiment, *override, "--json")[0] == 0
    merged = experiment.parent / "merged"
    code, _, err = weft_command("merge", experiment, "-o", merged, *override, *options)
    assert code == 2
    assert said in " ".join(err.split())
    assert not merged.exists()
