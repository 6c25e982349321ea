"""The main job by the command line: train, evaluate, look, fold, report, go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import weft
from weft.bases import load_base
from weft.config import read
from weft.experiment import train as train_experiment


def test_train_stores_tasks_and_reports_scores(experiment: Path, weft_command) -> None:
    code, out, _ = weft_command("train", experiment, "--json")
    assert code == 0
    results = json.loads(out)
    assert set(results) == {"bright", "red"}
    assert results["red"]["metrics"]["test"]["accuracy"] >= 0.5
    run = experiment.parent / "run"
    assert set(weft.Bank(run / "bank").tasks()) == {"bright", "red"}
    assert "<svg" in (run / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "history" / "red.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert json.loads((run / "results.json").read_text()) == results


def test_eval_repeats_the_scores_of_training(experiment: Path, weft_command) -> None:
    _, out, _ = weft_command("train", experiment, "--json")
    trained = json.loads(out)
    code, out, _ = weft_command("eval", experiment, "--split", "test", "--json")
    assert code == 0
    scores = json.loads(out)
    for name in trained:
        assert scores[name] == pytest.approx(trained[name]["metrics"]["test"])


def test_a_second_run_trains_nothing_and_gives_the_same(experiment: Path, weft_command) -> None:
    _, first, _ = weft_command("train", experiment, "--json")
    bundles = experiment.parent / "run" / "bank" / "tasks"
    before = {p: p.stat().st_mtime_ns for p in bundles.rglob("*") if p.is_file()}
    code, second, _ = weft_command("train", experiment, "--json")
    assert code == 0
    assert json.loads(second) == json.loads(first)
    assert before == {p: p.stat().st_mtime_ns for p in bundles.rglob("*") if p.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_result(
    experiment: Path, weft_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = weft_command(
        "train", experiment, "--json", "--set", "output=" + str(experiment.parent / "whole")
    )
    whole = json.loads(out)

    from weft.training import run as running

    original, calls = running.Run.one_epoch, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(running.Run, "one_epoch", interrupted)
    code, _, err = weft_command("train", experiment, "--json")
    assert code == 130
    assert "again to go on" in err
    assert weft.Bank(experiment.parent / "run" / "bank").tasks() == ("bright",)
    monkeypatch.setattr(running.Run, "one_epoch", original)
    code, out, _ = weft_command("train", experiment, "--json")
    assert code == 0
    for name, row in json.loads(out).items():
        assert row["metrics"] == whole[name]["metrics"]


def test_dry_run_lists_tensors_and_refusals_and_trains_nothing(
    experiment: Path, weft_command
) -> None:
    code, out, _ = weft_command("train", experiment, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out)
    assert [p["name"] for p in planned] == ["bright", "red"]
    assert planned[0]["own"]["0.weight"] == 8 * 3 * 9
    assert planned[0]["ledger"]["own_parameters"] == 8 * 3 * 9 + 8 * 8 * 9 + 4 * 8
    assert not (experiment.parent / "run").exists()

    code, out, _ = weft_command("train", experiment, "--dry-run")
    assert "0.weight" in out
    assert "at most" in out

    code, out, _ = weft_command("train", experiment, "--dry-run", "--set", "method=depthwise_patch")
    assert code == 2
    assert "depthwise convolutions" in out


def test_overrides_reach_training(experiment: Path, weft_command) -> None:
    code, out, _ = weft_command(
        "train", experiment, "--json", "--set", "method=linear_probe", "--set", "train.epochs=1"
    )
    assert code == 0
    assert {row["own_parameters"] for row in json.loads(out).values()} == {0}


def test_a_plan_that_trains_shared_tensors_trains_its_tasks_together(
    experiment: Path, weft_command
) -> None:
    code, out, _ = weft_command("train", experiment, "--json", "--set", "method=hard_sharing")
    assert code == 0
    assert set(json.loads(out)) == {"bright", "red"}
    assert (experiment.parent / "run" / "history" / "joint.jsonl").exists()


def test_fold_writes_a_state_dict_that_the_plain_base_loads(
    experiment: Path, weft_command, tmp_path: Path
) -> None:
    weft_command("train", experiment, "--json")
    target = tmp_path / "red.safetensors"
    code, _, _ = weft_command("fold", experiment, "red", "-o", target)
    assert code == 0
    tensors = load_file(target)
    base, _ = load_base(read(experiment).base.name)
    model = weft.Bank(experiment.parent / "run" / "bank").load(base).eval()
    plain = load_base(read(experiment).base.name)[0]
    plain.load_state_dict({n[5:]: t for n, t in tensors.items() if n.startswith("base.")})
    x = torch.randn(2, 3, 8, 8)
    features = plain.eval()(x)
    logits = features @ tensors["head.linear.weight"].T + tensors["head.linear.bias"]
    torch.testing.assert_close(logits, model(x, task="red"))


def test_bank_verbs(experiment: Path, weft_command) -> None:
    weft_command("train", experiment, "--json")
    bank = experiment.parent / "run" / "bank"
    code, out, _ = weft_command("bank", "list", bank, "--json")
    assert code == 0
    assert set(json.loads(out)) == {"bright", "red"}
    code, out, _ = weft_command("bank", "show", bank, "red")
    assert json.loads(out)["plan"]["method"] == "taps"
    assert weft_command("bank", "verify", bank)[0] == 0
    own = next((bank / "tasks" / "red").glob("**/own.safetensors"))
    own.write_bytes(own.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    code, out, _ = weft_command("bank", "verify", bank)
    assert code == 1
    assert "red" in out
    assert weft_command("bank", "remove", bank, "bright")[0] == 0
    assert weft.Bank(bank).tasks() == ("red",)


def test_report_verb_writes_page_and_figures(
    experiment: Path, weft_command, tmp_path: Path
) -> None:
    weft_command("train", experiment, "--json")
    bank = experiment.parent / "run" / "bank"
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert weft_command("report", bank, "-o", page, "--figures", figures)[0] == 0
    assert "bright" in page.read_text()
    assert list(figures.glob("*.svg"))
    assert list(figures.glob("*.png"))


def test_train_from_python_equals_the_command(experiment: Path, weft_command) -> None:
    _, out, _ = weft_command("train", experiment, "--json")
    other = read(experiment, [f"output={experiment.parent / 'other'}"])
    results = train_experiment(other, progress=False)
    for name, row in json.loads(out).items():
        assert results[name]["metrics"] == row["metrics"]


def test_doctor_and_methods(weft_command) -> None:
    code, out, _ = weft_command("doctor", "--json")
    assert code == 0
    assert json.loads(out)["self-check"].startswith("ok")
    code, out, _ = weft_command("methods", "--json")
    assert {row["name"] for row in json.loads(out)} == set(weft.METHODS)


@pytest.mark.parametrize(
    "override", ["method.penalty=5", "train.epochs=4", "tasks.red.options.head_init=zero"]
)
def test_a_stored_task_is_not_passed_off_for_another_configuration(
    experiment: Path, weft_command, override: str
) -> None:
    weft_command("train", experiment, "--json", "--set", "train.epochs=3")
    code, _, err = weft_command("train", experiment, "--json", "--set", override)
    assert code == 2
    assert "by another configuration" in err
    assert override.split(".")[0].removesuffix("s") in err


def test_another_base_is_refused_before_any_training(experiment: Path, weft_command) -> None:
    weft_command("train", experiment, "--json")
    weft_command("bank", "remove", experiment.parent / "run" / "bank", "red")
    net = experiment.parent / "net.py"
    net.write_text(net.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    code, _, err = weft_command("train", experiment, "--json")
    assert code == 2
    assert "base" in err


def test_dry_run_shows_that_only_the_models_plan_may_train_shared_tensors(
    experiment: Path, weft_command
) -> None:
    code, out, _ = weft_command(
        "train", experiment, "--dry-run", "--set", "tasks.red.method=hard_sharing"
    )
    assert code == 2
    assert "only the model's own plan may" in " ".join(out.split())


def test_a_base_can_be_trained_on_all_tasks_first(experiment: Path, weft_command) -> None:
    first = ["--set", "pretrain.epochs=2", "--set", "pretrain.lr=0.05"]
    code, out, _ = weft_command("train", experiment, "--json", *first)
    assert code == 0
    results = json.loads(out)
    run = experiment.parent / "run"
    weights = load_file(run / "pretraining" / "base.safetensors")
    base, _ = load_base(read(experiment).base.name)
    assert weights.keys() == base.state_dict().keys()
    assert all(not torch.equal(t, weights[n]) for n, t in base.state_dict().items())
    base.load_state_dict(weights)
    assert weft.Bank(run / "bank").load(base).task_names == ("bright", "red")
    code, out, _ = weft_command("eval", experiment, "--json", *first)
    assert code == 0
    scores = json.loads(out)
    assert scores["red"] == pytest.approx(results["red"]["metrics"]["test"])
    before = (run / "pretraining" / "base.safetensors").stat().st_mtime_ns
    code, out, _ = weft_command("train", experiment, "--json", *first)
    assert json.loads(out) == results
    assert (run / "pretraining" / "base.safetensors").stat().st_mtime_ns == before
    code, _, err = weft_command("train", experiment, "--json", "--set", "pretrain.epochs=3")
    assert code == 2
    assert "trained by another configuration" in " ".join(err.split())


def test_eval_before_training_names_the_missing_base(experiment: Path, weft_command) -> None:
    code, _, err = weft_command("eval", experiment, "--set", "pretrain.epochs=2")
    assert code == 2
    assert "The base is not trained yet" in " ".join(err.split())


def test_train_within_a_budget(experiment: Path, weft_command) -> None:
    code, out, _ = weft_command(
        "train", experiment, "--budget", "50%", "--set", "train.epochs=6", "--json"
    )
    assert code == 0
    assert all(row["own_fraction"] <= 0.5 for row in json.loads(out).values())


@pytest.mark.parametrize(
    ("budget", "most"),
    [("50%", None), ("0.5", None), ("1kB", 1000)],
)
def test_a_dry_run_says_what_a_budget_leaves(
    experiment: Path, weft_command, budget: str, most: int | None
) -> None:
    base, _ = load_base(read(experiment).base.name)
    parameters = sum(p.numel() for p in base.parameters())
    buffers = sum(b.numel() * b.element_size() for b in base.buffers())
    code, out, _ = weft_command("train", experiment, "--budget", budget, "--dry-run", "--json")
    assert code == 0
    expected = most or parameters // 2 * 4 + buffers  # a share is one of the parameters
    assert [p["most_bytes"] for p in json.loads(out)] == [expected] * 2
    code, out, _ = weft_command("train", experiment, "--budget", budget, "--dry-run")
    assert "The budget leaves at most" in out
    assert not (experiment.parent / "run").exists()


def test_a_dry_run_says_that_there_are_too_few_epochs(experiment: Path, weft_command) -> None:
    code, out, _ = weft_command("train", experiment, "--dry-run", "--set", "method.warmup=5")
    assert code == 2
    assert "needs at least 7 epochs" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "10%", "--set", "method=lora"), "--budget is TAPS's"),
        (("--budget", "110%"), "at most 100 %"),
        (("--budget", "much"), "A size is a number"),
        (("--budget", "10%", "--auto"), "leave out --budget"),
        (("--plan", "plan.yaml"), "--plan stands alone"),
        (("--jobs", "2"), "--jobs belongs to --auto and --plan"),
        (("--seeds", "3"), "--seeds belongs to --auto"),
        (("-o", "elsewhere"), "Say --set output=FOLDER"),
    ],
)
def test_shortcuts_that_do_not_go_together(
    experiment: Path, weft_command, options: tuple[str, ...], said: str
) -> None:
    code, _, err = weft_command("train", experiment, *options)
    assert code == 2
    assert said in " ".join(err.split())


def test_train_needs_something_to_train(weft_command) -> None:
    code, _, err = weft_command("train")
    assert code == 2
    assert "or --plan" in err


def test_auto_lists_its_steps_and_climbs(experiment: Path, weft_command) -> None:
    code, out, _ = weft_command("train", experiment, "--auto", "--dry-run", "--json")
    assert code == 0
    steps = json.loads(out)
    assert next(iter(steps)) == "linear_probe"
    sizes = [step["most_bytes"] for step in steps.values() if step is not None]
    assert sizes == sorted(sizes)
    code, out, _ = weft_command(
        "train", experiment, "--auto", "--patience", "1", "--threshold", "1000", "--json"
    )
    assert code == 0
    assert {len(steps) for steps in json.loads(out).values()} == {2}


def test_data_that_leaks_is_warned_of_before_training(experiment: Path, weft_command) -> None:
    arrays = np.load(experiment.parent / "red.npz")
    x, y = arrays["x"], arrays["y"]
    np.savez(experiment.parent / "red.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    code, _, err = weft_command("train", experiment, "--dry-run")
    assert code == 0
    assert "warning: Task 'red': 5 of 5 inputs of test also occur in" in " ".join(err.split())
