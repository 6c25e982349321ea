"""Cheap methods first: what counts as a gain, who climbs, and that nothing is trained twice."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import weft.auto
import weft.comparing.fleet
from weft.assembly import load_experiment_base, make_loaders, read_task
from weft.auto import climb, correct, gain_and_error, ladder
from weft.bank import Bank
from weft.comparing import make_fleet, open_fleet, run_fleet
from weft.comparing.locks import held
from weft.comparing.spreading import run_here
from weft.config import Experiment, MethodSection
from weft.errors import ConfigError, TrainingError
from weft.experiment import train
from weft.schema import validated

BASE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    with torch.no_grad():
        net[0].weight[:, 3:] = 0  # what the last three inputs say does not reach a head
    return net
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A task that a head solves, and one that needs another first layer."""
    (tmp_path / "net.py").write_text(textwrap.dedent(BASE))
    generator = np.random.default_rng(0)
    for name, column in (("head", 0), ("layers", 5)):
        x = generator.normal(size=(300, 6)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, y=(x[:, column] > 0).astype(np.int64))
    return validated(
        Experiment,
        {
            "base": {"name": f"python:{tmp_path / 'net.py'}:make"},
            "method": "taps",
            "tasks": {n: {"data": f"npz:{tmp_path / n}.npz"} for n in ("head", "layers")},
            "data": {"batch_size": 32},
            "train": {"epochs": 5, "lr": 0.3},
            "output": str(tmp_path / "run"),
        },
    )


def test_a_task_climbs_only_while_it_pays(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.auto, "LADDER", weft.auto.LADDER[::2])
    told: list[str] = []
    short = climb(experiment, threshold=4.0, patience=1, progress=False)
    assert {len(steps) for steps in short.steps.values()} == {2}
    found = climb(experiment, threshold=4.0, patience=2, progress=False, told=told.append)
    assert found.chosen["head"].method == "linear_probe"
    assert found.chosen["layers"].own_bytes
    assert found.chosen["layers"].val > found.steps["layers"][0].val + 0.2
    assert len(told) == sum(map(len, found.steps.values()))
    for steps in found.steps.values():
        assert all(s.gain is None or s.error >= 0 for s in steps)
    assert found.bank.ledger("head").own_bytes == 0
    assert found.bank.ledger("layers").own_bytes > 0
    stated = yaml.safe_load((Path(experiment.output) / "auto.yaml").read_text())
    assert stated["tasks"]["head"]["chosen"] == "linear_probe"
    said = stated["tasks"]["head"]["said"]
    assert said == found.summary("head")
    assert said.startswith(
        "head owns 0 bytes by linear_probe. Not worth their bytes: taps budget=0.1"
    )
    assert " over the best cheaper step" in found.summary("layers")


@pytest.mark.slow
def test_again_nothing_is_trained_and_other_rules_replace_the_bank(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.auto, "LADDER", (weft.auto.LADDER[0], weft.auto.LADDER[-1]))
    climb(experiment, progress=False)
    root = Path(experiment.output)
    before = {f: f.stat().st_mtime_ns for f in root.glob("auto/cells/*/result.json")}
    found = climb(experiment, progress=False)
    assert {f: f.stat().st_mtime_ns for f in root.glob("auto/cells/*/result.json")} == before
    strict = climb(experiment, threshold=1e6, patience=1, progress=False)
    assert {s.method for s in strict.chosen.values()} == {"linear_probe"}
    assert strict.bank.ledger("layers").own_bytes == 0
    assert found.bank.path == strict.bank.path
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())


def test_gain_and_error_are_the_formula(experiment: Experiment) -> None:
    run_fleet(make_fleet(_two_steps(experiment)), progress=False)
    cells = open_fleet(Path(experiment.output) / "auto").cells
    before = [c for c in cells if c.label == "linear_probe" and "layers" in c.tasks]
    after = [c for c in cells if c.label == "full_finetune" and "layers" in c.tasks]
    gain, error = gain_and_error("layers", before, after)
    right = [np.stack([_right(c) for c in part]) for part in (before, after)]
    by_seed = [r.mean(1) for r in right]
    assert gain == pytest.approx(by_seed[1].mean() - by_seed[0].mean())
    rows = right[1].mean(0) - right[0].mean(0)
    squared = sum(s.var(ddof=1) for s in by_seed) / 2 + rows.var(ddof=1) / rows.size
    assert error == pytest.approx(squared**0.5)


def test_without_rows_the_spread_over_seeds_is_the_noise_as_student_says(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps that gain nothing, a threshold of 2 keeps what the module's head says."""
    generator = np.random.default_rng(0)
    fleet = make_fleet(_two_steps(experiment))
    cells = [c for c in fleet.cells if "head" in c.tasks]
    row = {"metric": "mse", "higher_is_better": False}
    monkeypatch.setattr(weft.auto, "_row", lambda *_: row)
    monkeypatch.setattr(weft.auto, "_val", lambda *_: float(generator.normal()))
    for seeds, kept in ((2, 0.092), (3, 0.058)):
        steps = [(cells[0],) * seeds, (cells[-1],) * seeds]
        found = [gain_and_error("head", *steps) for _ in range(4000)]
        assert sum(gain > 2 * error for gain, error in found) / 4000 == pytest.approx(
            kept, abs=0.015
        )


def test_tasks_that_were_trained_otherwise_are_not_replaced(experiment: Experiment) -> None:
    train(experiment.model_copy(update={"method": MethodSection(name="linear_probe")}),
          progress=False)  # fmt: skip
    with pytest.raises(ConfigError, match=r"trained otherwise\. Use another output"):
        climb(experiment, progress=False)


def test_a_step_that_another_process_trains_is_waited_for(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.auto, "LADDER", weft.auto.LADDER[:1])
    first = ladder(experiment, 2).cells[0]
    with held(first.file("lock")), pytest.raises(TrainingError, match="Wait for it"):
        climb(experiment, progress=False)
    assert climb(experiment, progress=False).chosen["head"].method == "linear_probe"


def test_killed_at_the_end_it_goes_on(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.auto, "LADDER", weft.auto.LADDER[:1])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(weft.auto, "gather", killed)
        with pytest.raises(KeyboardInterrupt):
            climb(experiment, progress=False)
    assert set(climb(experiment, progress=False).bank.tasks()) == {"head", "layers"}


def _two_steps(experiment: Experiment) -> weft.auto.Comparison:
    comparison = ladder(experiment, 2).comparison
    ends = (comparison.methods[0], comparison.methods[-1])
    return comparison.model_copy(update={"methods": ends})


def _right(cell: weft.auto.Cell) -> np.ndarray:
    """Which rows a cell has right, by hand: its plain network on the validation rows."""
    base, stated = load_experiment_base(cell.experiment)
    sets = read_task(cell.experiment, "layers")
    model = Bank(cell.folder.bank).load(base, "layers").eval()
    plain, head = model.fold("layers").eval(), model.head("layers")
    loader = make_loaders(cell.experiment, "layers", sets, stated)["val"]
    found = [(head(plain(x)).argmax(1) == y).numpy() for x, y in loader]
    np.testing.assert_array_equal(np.concatenate(found), correct(cell, "layers").numpy())
    return np.concatenate(found).astype(float)


@pytest.mark.slow
def test_a_step_that_cannot_be_used_is_passed(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = weft.auto.LADDER
    bad = steps[2].model_copy(update={"options": {"budget": 1}})
    bad = bad.model_copy(update={"name": "depthwise_patch", "options": {}})
    monkeypatch.setattr(weft.auto, "LADDER", (steps[0], bad, steps[-1]))
    one = {"layers": experiment.tasks["layers"]}
    found = climb(experiment.model_copy(update={"tasks": one}), progress=False)
    assert "left out" in found.steps["layers"][1].said
    assert found.chosen["layers"].method == "full_finetune"


def test_a_step_that_failed_is_tried_once(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = weft.auto.LADDER
    bad = steps[1].model_copy(update={"name": "depthwise_patch", "options": {}})
    last = steps[1].model_copy(update={"name": "bias_only", "options": {}})
    monkeypatch.setattr(weft.auto, "LADDER", (steps[0], bad, last))
    tried: list[str] = []

    def counted(cells: Sequence[weft.auto.Cell], on_event: Any) -> None:
        tried.extend(cell.name for cell in cells)
        run_here(cells, on_event)

    monkeypatch.setattr(weft.comparing.fleet, "run_here", counted)
    climb(experiment, patience=3, progress=False)
    assert sum("depthwise_patch" in name for name in tried) == 4
    assert len(tried) == len(set(tried)) == 12


@pytest.mark.filterwarnings("ignore::weft.errors.DataWarning")
def test_without_validation_scores_nothing_can_be_kept(experiment: Experiment) -> None:
    section = experiment.data.model_copy(update={"val": 0.0})
    with pytest.raises(TrainingError, match="no validation score"):
        climb(experiment.model_copy(update={"data": section}), progress=False)


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"seeds": 1}, {}, "2 or more"),
        ({"threshold": -1.0}, {}, "threshold"),
        ({"patience": 0}, {}, "patience"),
        ({}, {"pretrain": {"epochs": 1}}, "pretrain"),
        ({}, {"train": {"joint": True}}, "each task goes as far as it pays"),
        ({}, {"method_of_a_task": "lora"}, "the method is what is looked for"),
    ],
)
def test_what_cannot_be_is_refused(
    experiment: Experiment, options: dict[str, float], changes: dict[str, object], said: str
) -> None:
    content = experiment.model_dump(exclude_unset=True)
    if "method_of_a_task" in changes:
        content["tasks"]["head"]["method"] = {"name": "lora"}
    else:
        content |= changes
    with pytest.raises(ConfigError, match=said):
        climb(validated(Experiment, content), progress=False, **options)
