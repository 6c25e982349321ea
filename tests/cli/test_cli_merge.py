"""Merge by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weft
from weft.bases import load_base


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--how", "soup", "--scale", "1"), "average, task_arithmetic, ties"),
        (("--scale", "big"), "a number or choose"),
        (("--task", "rad"), "no stored task 'rad'. Close matches: red"),
        (("--density", "2"), "density"),
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
