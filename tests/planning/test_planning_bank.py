"""A plan becomes a bank: from the bundles that a comparison kept, nothing trained again."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from weft.assembly import make_loaders, read_task
from weft.bank import Bank
from weft.bases import load_base
from weft.comparing import compare, open_fleet
from weft.errors import PlanError, TrainingError
from weft.planning import assemble, plan, train_plan
from weft.training import evaluate

BASE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
"""


def files(folder: Path) -> None:
    """A base in a file, and data of three tasks on rows of numbers."""
    (folder / "net.py").write_text(textwrap.dedent(BASE))
    generator = np.random.default_rng(0)
    for i, name in enumerate("abc"):
        x = generator.normal(size=(120, 6)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=(x[:, i] > 0).astype(np.int64))


def content(folder: Path) -> dict[str, Any]:
    """A comparison of methods for each task and of one for two of them together."""
    return {
        "base": {"name": f"python:{folder / 'net.py'}:make"},
        "tasks": {name: {"data": f"npz:{folder / name}.npz"} for name in "abc"},
        "methods": [
            "linear_probe",
            "full_finetune",
            {"name": "hard_sharing", "tasks": ["a", "b"]},
        ],
        "seeds": 2,
        "data": {"batch_size": 16},
        "train": {"epochs": 2, "lr": 0.1},
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that was run."""
    folder = tmp_path_factory.mktemp("project")
    files(folder)
    compare({**content(folder), "output": str(folder / "run")}, progress=False)
    return folder


@pytest.fixture
def comparison(project: Path, tmp_path: Path) -> dict[str, Any]:
    """The same, run already, in a folder of the test's own."""
    shutil.copytree(project / "run", tmp_path / "run")
    return {**content(project), "output": str(tmp_path / "run")}


def test_a_plan_is_assembled_from_kept_bundles(comparison: dict[str, Any], tmp_path: Path) -> None:
    frame = compare(comparison, progress=False)
    # As if the joint cell were best for its tasks, so that the plan mixes both kinds.
    joint = frame["label"] == "hard_sharing"
    frame.loc[joint, "val"] = 1.0
    made = plan(frame, "3x")
    assert {pick.tasks for pick in made.chosen.picks} == {("a", "b"), ("c",)}
    with pytest.raises(PlanError, match="made from a table"):
        assemble(made, tmp_path / "bank")

    from dataclasses import replace

    bank = assemble(replace(made, comparison=tmp_path / "run"), tmp_path / "bank")
    assert sorted(bank.tasks()) == ["a", "b", "c"]
    assert bank.verify() == []
    base, stated = load_base(comparison["base"]["name"])
    tested = frame.set_index(["cell", "task"])["test"]
    experiment = open_fleet(tmp_path / "run").cells[0].experiment
    every = {**comparison["tasks"]}
    for pick in made.chosen.picks:
        cell = pick.cells[pick.best_seed(heads=False)]
        model = bank.load(base, *pick.tasks)
        for task in pick.tasks:
            section = experiment.tasks["a"].model_copy(update={"data": every[task]["data"]})
            one = experiment.model_copy(update={"tasks": {task: section}})
            loaders = make_loaders(one, task, read_task(one, task), stated)
            score = evaluate(model, {task: loaders["test"]})[task]["accuracy"]
            assert score == pytest.approx(tested[cell, task])
    with pytest.raises(PlanError, match="holds tasks already"):
        assemble(replace(made, comparison=tmp_path / "run"), tmp_path / "bank")


def test_a_plan_of_a_folder_is_that_of_its_table(
    comparison: dict[str, Any], tmp_path: Path
) -> None:
    separate = {**comparison, "methods": ["linear_probe", "full_finetune"]}
    frame = compare(separate, progress=False)
    by_folder = plan(tmp_path / "run", "3x").to_dict()
    by_table = plan(frame, "3x").to_dict()
    by_file = plan(pd.read_csv(tmp_path / "run" / "results.csv"), "3x").to_dict()
    assert by_folder.pop("comparison") == str(tmp_path / "run")
    assert by_table.pop("comparison") is None
    assert by_file.pop("comparison") is None
    picked = {line["cell"] for line in by_folder["tasks"].values()}
    assert set(by_folder.pop("cells")) == picked
    assert by_table.pop("cells") == by_file.pop("cells") == {}
    assert by_folder == by_table == by_file


def same_tensors(one: Bank, other: Bank, task: str) -> bool:
    found = sorted((one.path / "tasks" / task).rglob("*.safetensors"))
    others = sorted((other.path / "tasks" / task).rglob("*.safetensors"))
    assert found
    return [load_file(f).keys() for f in found] == [load_file(f).keys() for f in others] and all(
        torch.equal(value, load_file(b)[key])
        for a, b in zip(found, others, strict=True)
        for key, value in load_file(a).items()
    )


def test_a_plan_is_trained_from_its_file_alone(comparison: dict[str, Any], tmp_path: Path) -> None:
    compare(comparison, progress=False)
    made = plan(comparison["output"], "3x")
    file = made.write(tmp_path / "plan.yaml")
    kept = train_plan(file, tmp_path / "kept", progress=False)
    assert not (tmp_path / "kept" / "training").exists()  # nothing had to be trained
    Path(comparison["output"]).rename(tmp_path / "away")
    trained = train_plan(file, tmp_path / "trained", progress=False)
    assert set(trained.tasks()) == set(kept.tasks()) == {"a", "b", "c"}
    for task in kept.tasks():
        assert same_tensors(kept, trained, task)
    results = sorted((tmp_path / "trained").glob("training/cells/*/result.json"))
    times = [r.stat().st_mtime_ns for r in results]
    train_plan(file, tmp_path / "trained", progress=False)
    assert [r.stat().st_mtime_ns for r in results] == times


def test_paths_of_a_plan_are_seen_from_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    files(project)
    monkeypatch.chdir(project)
    relative = {**content(Path()), "methods": ["linear_probe"], "seeds": 1, "output": "run"}
    compare({**relative, "train": {"epochs": 1}}, progress=False)
    plan("run", "2x").write("run/plan.yaml")
    train_plan("run/plan.yaml", progress=False)
    here = Bank(project / "run" / "chosen" / "bank")
    assert not (project / "run" / "chosen" / "training").exists()

    monkeypatch.chdir(tmp_path)
    kept = train_plan(project / "run" / "plan.yaml", "kept", progress=False)
    (project / "run" / "cells").rename(project / "gone")
    trained = train_plan(project / "run" / "plan.yaml", "trained", progress=False)
    for task in "abc":
        assert same_tensors(here, kept, task)
        assert same_tensors(here, trained, task)

    project.rename(tmp_path / "moved")
    with pytest.raises(PlanError, match=r"made in .*project, which is gone.*directory: PATH"):
        train_plan("moved/run/plan.yaml", "again", progress=False)
    moved = Path("moved/run/plan.yaml")
    stated = yaml.safe_load(moved.read_text())
    moved.write_text(yaml.safe_dump({**stated, "directory": ".."}))
    again = train_plan(moved, "again", progress=False)
    assert same_tensors(Bank("moved/run/chosen/bank"), again, "a")


def test_files_that_are_no_plans_are_refused(comparison: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="weft plan first"):
        train_plan(tmp_path / "none.yaml")
    (tmp_path / "other.yaml").write_text("base: {}")
    with pytest.raises(PlanError, match="is no plan"):
        train_plan(tmp_path / "other.yaml")
    (tmp_path / "broken.yaml").write_text("{")
    with pytest.raises(PlanError, match="is no plan"):
        train_plan(tmp_path / "broken.yaml")
    of_table = plan(compare(comparison, progress=False), "3x").write(tmp_path / "table.yaml")
    with pytest.raises(PlanError, match="made from a table"):
        train_plan(of_table)


@pytest.mark.slow
def test_a_training_that_fails_is_told(comparison: dict[str, Any], tmp_path: Path) -> None:
    compare(comparison, progress=False)
    file = plan(comparison["output"], "3x").write(tmp_path / "plan.yaml")
    Path(comparison["output"]).rename(tmp_path / "away")
    broken = tmp_path / "broken.py"
    broken.write_text("def make(): raise RuntimeError('no base today')")
    stated = yaml.safe_load(file.read_text())
    for cell in stated["cells"].values():
        cell["experiment"]["base"]["name"] = f"python:{broken}:make"
    file.write_text(yaml.safe_dump(stated))
    with pytest.raises(TrainingError, match="no base today"):
        train_plan(file, tmp_path / "trained", progress=False)
