"""Cheap methods first: what counts as a gain, who climbs, and that nothing is trained twice."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

import weft.auto
from weft.assembly import load_experiment_base, make_loaders, read_task
from weft.auto import climb, correct, gain_and_error, ladder
from weft.bank import Bank
from weft.comparing import make_fleet, open_fleet, run_fleet
from weft.config import Experiment
from weft.errors import ConfigError
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


def test_a_task_climbs_only_while_it_pays(experiment: Experiment) -> None:
    told: list[str] = []
    short = climb(experiment, threshold=4.0, patience=2, progress=False)
    assert {len(steps) for steps in short.steps.values()} == {3}
    found = climb(experiment, threshold=4.0, patience=4, progress=False, told=told.append)
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


def test_again_nothing_is_trained_and_other_rules_replace_the_bank(
    experiment: Experiment,
) -> None:
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


def test_a_step_that_cannot_be_used_is_passed(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = weft.auto.LADDER
    bad = steps[2].model_copy(update={"options": {"budget": 1}})
    bad = bad.model_copy(update={"name": "depthwise_patch", "options": {}})
    monkeypatch.setattr(weft.auto, "LADDER", (steps[0], bad, steps[-1]))
    found = climb(experiment, progress=False)
    assert "left out" in found.steps["layers"][1].said
    assert found.chosen["layers"].method == "full_finetune"


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"seeds": 1}, {}, "2 or more"),
        ({"threshold": -1.0}, {}, "threshold"),
        ({"patience": 0}, {}, "patience"),
        ({}, {"pretrain": {"epochs": 1}}, "pretrain"),
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
