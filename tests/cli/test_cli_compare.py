"""Compare and plan by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

import weft
from weft.bases import load_base


@pytest.fixture
def comparison(experiment: Path) -> Path:
    """The path of a comparison's YAML file, beside that of the experiment."""
    content = yaml.safe_load(experiment.read_text())
    del content["method"]
    content["methods"] = ["linear_probe", "full_finetune"]
    path = experiment.with_name("comparison.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_compare_plan_and_bank(comparison: Path, weft_command) -> None:
    code, out, err = weft_command("compare", comparison, "--json")
    assert code == 0
    assert err == ""
    told = json.loads(out)
    assert len(told["rows"]) == 4
    assert told["waiting"] == 0
    run = comparison.parent / "run"
    assert len(pd.read_csv(run / "results.csv")) == 4

    page = comparison.parent / "page.html"
    code, out, _ = weft_command("report", run, "--output", page, "--budget", "2x")
    assert code == 0
    assert "Within" in page.read_text(encoding="utf-8")

    bank = comparison.parent / "bank"
    code, out, _ = weft_command("plan", comparison, "--budget", "2x", "--bank", bank, "--json")
    assert code == 0
    made = json.loads(out)
    assert made["plan"]["bytes"] <= made["budget_bytes"] == made["base_bytes"]
    assert yaml.safe_load((run / "plan.yaml").read_text()) == made
    base, _ = load_base(made_base(comparison))
    assert weft.Bank(bank).load(base).task_names == ("bright", "red")

    code, out, _ = weft_command("plan", run, "--budget", "sweep", "--points", "5", "--json")
    assert code == 0
    assert json.loads(out)[0]["budget_bytes"] == 0
    assert len(pd.read_csv(run / "curve.csv")) >= 3
    for arguments in (["--budget", "2x"], ["--budget", "1x", "--budget", "3x"]):
        for more in ([], ["--relative-to", "full_finetune"]):
            code, out, _ = weft_command("plan", run, *arguments, *more)
            assert code == 0
            assert "single" in out
            assert ("mprovement over full_finetune in %" in " ".join(out.split())) == bool(more)


def test_a_method_for_some_tasks_leaves_a_hole_in_the_table(comparison: Path, weft_command) -> None:
    methods = "methods=[linear_probe, {name: bias_only, tasks: [red]}]"
    code, out, _ = weft_command("compare", comparison, "--set", methods)
    assert code == 0
    (line,) = (line for line in out.splitlines() if "bias_only" in line)
    assert line.count(" - ") == 1
    assert "Next:" in out


def made_base(comparison: Path) -> str:
    return str(yaml.safe_load(comparison.read_text())["base"]["name"])


def test_a_dry_run_lists_cells_and_trains_nothing(comparison: Path, weft_command) -> None:
    code, out, _ = weft_command("compare", comparison, "--dry-run", "--json", "--shard", "1/2")
    assert code == 0
    rows = json.loads(out)
    assert [row["tasks"] for row in rows] == [["bright"], ["bright"]]
    assert rows[1]["ledger"]["own_parameters"] > 0
    assert not (comparison.parent / "run").exists()
    code, out, _ = weft_command(
        "compare", comparison, "--dry-run", "--set", "methods=[depthwise_patch]"
    )
    assert code == 2
    assert "2 cells, 0 of them finished" in out
    assert "depthwise_patch: depthwise_patch owns" in out


def test_failures_are_told_by_words_and_by_the_exit_status(comparison: Path, weft_command) -> None:
    methods = "methods=[linear_probe, depthwise_patch]"
    code, out, err = weft_command("compare", comparison, "--set", methods)
    assert code == 1
    words = " ".join(out.split())
    assert "this base has none" in words
    assert "2 of 4 cells are not finished" in words
    assert "4/4 red depthwise_patch seed 0: failed" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "{yaml}", "--shard", "3"], "--shard is i/n"),
        (["compare", "{yaml}", "--shard", "3/2"], "A shard is i/n"),
        (["compare", "{yaml}", "--device", "cuda"], "device: found 'cuda', expected one of cpu"),
        (["compare", "{yaml}", "--set", "methods=[tabs]"], "methods.0.name"),
        (["plan", "{yaml}", "--budget", "2x"], "Run weft compare"),
        (["plan", "{yaml}l", "--budget", "2x"], "Close matches: comparison.yaml"),
        (["compare", "{yaml}l"], "Close matches: comparison.yaml"),
        (["compare", "{yaml}", "--set", "pretrain={}"], "methods: [{name: taps, pretrain:"),
    ],
)
def test_errors_say_what_to_do(
    comparison: Path, weft_command, arguments: list[str], said: str
) -> None:
    code, _, err = weft_command(*(a.replace("{yaml}", str(comparison)) for a in arguments))
    assert code == 2
    assert said in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "lots"], "A size is a number"),
        (["--budget", "0.5x"], "at least 1x"),
        (["--budget", "2x", "--objective", "best"], "mean or worst"),
        (["--budget", "2x", "--weight", "red"], "--weight is TASK=NUMBER"),
        (["--budget", "2x", "--weight", "rot=1"], "no task 'rot'"),
        (["--budget", "1x", "--budget", "2x", "--bank", "b"], "--bank takes one budget"),
        (["--budget", "2x", "--relative-to", "lora"], "Labels: linear_probe"),
        (["--budget", "10", "--heads"], "the least that covers every task takes 144 bytes"),
    ],
)
def test_a_plan_that_cannot_be_says_why(
    comparison: Path, weft_command, arguments: list[str], said: str
) -> None:
    weft_command("compare", comparison, "--json", "--set", "methods=[linear_probe]")
    code, _, err = weft_command("plan", comparison.parent / "run", *arguments)
    assert code == 2
    assert said in " ".join(err.split())
