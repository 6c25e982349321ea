"""What else must come back: layouts, ties, heads and tasks of one's own, adapters, plans, order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import weft
import weft.adapters
from bank.banking import (
    assert_same_model,
    disturb,
    images,
    make_base,
    make_model,
    outputs,
    snapshot,
)
from weft.bank import Bank
from weft.core.adapter import Call, InlineAdapter, Insertion
from weft.core.sharing import Created, Group, Phase, Sharing
from weft.errors import BankError, PlanError, TaskError


def test_channels_last_tensors_come_back_channels_last(tmp_path: Path) -> None:
    base = make_base().to(memory_format=torch.channels_last)
    model = make_model(base, method="full_finetune")
    Bank(tmp_path).save(model)
    loaded = Bank(tmp_path).load(base)
    assert loaded.tasks["a"].own["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert_same_model(loaded, model, images().contiguous(memory_format=torch.channels_last))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.output = nn.Linear(4, 7, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.embedding(x))

    base = Tied()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 5).long())
    model.add_task("a", weft.Classification(3))
    disturb(model)
    bank = Bank(tmp_path)
    bank.save(model)
    assert list(bank.info("a")["own"]["tensors"]) == ["embedding.weight"]
    loaded = bank.load(base)
    assert_same_model(loaded, model, torch.randint(0, 7, (3, 5)))
    folded = loaded.fold("a")
    assert folded.output.weight is folded.embedding.weight
    untied = Tied()
    untied.load_state_dict(base.state_dict())
    untied.output.weight = nn.Parameter(untied.output.weight.clone())
    with pytest.raises(BankError, match=r"1 tensor is new \(output.weight\)"):
        bank.load(untied)


class Decoder(nn.Module):
    """A head of one's own: recurrent, with a buffer and half of its tensors in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x.flatten(2).transpose(1, 2))[0][:, -1] * self.scale * self.frozen


def l1(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


def test_heads_and_losses_of_ones_own_are_handed_in(tmp_path: Path) -> None:
    base = make_base()
    model = make_model(base, "a")
    model.add_task("depth", weft.Task(head=Decoder(), loss=l1))
    model.add_task("plain", weft.Task(head=None, loss=l1))
    disturb(model)
    with torch.no_grad():
        model.head("depth").scale.fill_(3.0)
    bank = Bank(tmp_path)
    bank.save(model)

    with pytest.raises(BankError, match=r"heads=\{'depth': Decoder\(\.\.\.\)\}"):
        bank.load(base)
    mine = Decoder()
    untouched = snapshot(mine)
    loaded = bank.load(base, heads={"depth": mine})
    assert_same_model(loaded, model, images())
    assert all(torch.equal(untouched[n], t) for n, t in snapshot(mine).items())
    assert not loaded.head("depth").frozen.requires_grad
    with pytest.raises(TaskError, match=r"custom_tasks=\{'depth'"):
        loaded.tasks["depth"].task.loss(torch.ones(1), torch.ones(1))

    task = weft.Task(head=Decoder(), loss=l1)
    loaded = bank.load(base, custom_tasks={"depth": task})
    assert_same_model(loaded, model, images())
    assert loaded.tasks["depth"].task.loss is l1
    with pytest.raises(BankError, match="Two heads"):
        bank.load(base, heads={"depth": mine}, custom_tasks={"depth": task})
    with pytest.raises(BankError, match=r"is not the one that was saved.*is missing"):
        bank.load(base, "depth", heads={"depth": nn.Linear(6, 5)})
    with pytest.raises(BankError, match=r"'deph', which is not loaded. Close matches: depth"):
        bank.load(base, "depth", heads={"deph": mine})
    with pytest.raises(BankError, match="saved without a head"):
        bank.load(base, "plain", heads={"plain": mine})

    other = bank.load(base, "a")
    bank.add_to(other, "depth", head=mine)
    bank.add_to(other, "plain", custom_task=weft.Task(head=None, loss=l1))
    assert_same_model(other, model, images())


def test_a_builtin_task_with_another_head_or_loss_says_so(tmp_path: Path) -> None:
    from dataclasses import replace

    base = make_base()
    model = make_model(base, "a")
    model.add_task("head", replace(weft.Classification(3), head=nn.Flatten()))
    model.add_task("loss", replace(weft.Classification(3), loss=l1))
    bank = Bank(tmp_path)
    bank.save(model)
    assert [bank.info(t)["definition"]["hand_in"] for t in bank] == [[], ["head"], ["loss"]]
    loaded = bank.load(base, heads={"head": nn.Flatten()})
    assert_same_model(loaded, model, images())
    with pytest.raises(TaskError, match="loss of 'loss'"):
        loaded.tasks["loss"].task.loss(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    "task",
    [
        weft.Classification(["x", "y"], smoothing=0.1),
        weft.Binary(),
        weft.Binary(4),
        weft.Regression(3, loss="l1"),
        weft.Segmentation(5, ignore=9),
    ],
    ids=["classification", "binary", "multi-label", "regression", "segmentation"],
)
def test_builtin_tasks_come_back_by_themselves(task: weft.Task, tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=images(1))
    model.add_task("t", task)
    Bank(tmp_path).save(model)
    loaded = Bank(tmp_path).load(base)  # without an example
    assert_same_model(loaded, model, images())
    assert loaded.tasks["t"].task.spec == task.spec
    assert loaded.tasks["t"].task.loss == task.loss


def test_a_head_that_needs_features_is_built_from_the_example(tmp_path: Path) -> None:
    base = make_base()

    def make(features: Tensor) -> nn.Module:
        assert features.shape[-1] == 4, "a head that looks at the size of the map"
        return nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 2))

    model = weft.MultiTaskModel(base, weft.taps(base), example=images(1))
    task = weft.Task(head=make, loss=l1)
    model.add_task("t", task)
    Bank(tmp_path).save(model)
    with pytest.raises(BankError, match="example=x"):
        Bank(tmp_path).load(base, custom_tasks={"t": task})
    loaded = Bank(tmp_path).load(base, custom_tasks={"t": task}, example=images(1))
    assert_same_model(loaded, model, images())


def test_an_unbuilt_head_is_named_before_anything_is_written(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.taps(base))
    model.add_task("a", weft.Classification(3))
    with pytest.raises(TaskError, match="head of 'a' is not built"):
        Bank(tmp_path / "bank").save(model)
    assert not (tmp_path / "bank").exists()


# ------------------------------------------------------------------- plans and shared state


class Scaled(InlineAdapter):
    """An adapter with a tensor of the task and one of all tasks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(channels))
        self.common = nn.Parameter(torch.randn(channels))

    def shared_names(self) -> frozenset[str]:
        return frozenset({"common"})

    def fold(self, site: nn.Module) -> nn.Module:  # noqa: ARG002
        raise PlanError("never")

    def forward(self, _: Call, __: str, inner: Callable[..., Any], *args: Any) -> Any:
        return inner(*args) + (self.own * self.common)[:, None, None]


@dataclass(frozen=True)
class InsertScaled(Insertion):
    channels: tuple[int, ...]

    def build(self, site: nn.Module) -> Scaled:  # noqa: ARG002
        return Scaled(*self.channels)


def scaled(options: dict[str, Any] | None = None) -> Sharing:
    return Sharing(
        "scaled",
        options=options or {"sites": ("0",), "rate": 0.5},
        adapters={"0": InsertScaled((6,)), "3": InsertScaled((6,))},
        created={
            "basis": Created(torch.randn(2, 3)),
            "fixed": Created(torch.ones(2), trains=False),
        },
        phases=(Phase("one", epochs=2, freeze=("*:own",)), Phase("two", data=(0.0, 0.5))),
        groups=(Group(("*:own",), lr=3.0, decay=False),),
        refused={"1": "no convolution"},
    )


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weft.adapters.INSERTIONS, "scaled", InsertScaled)


@pytest.mark.usefixtures("named")
def test_adapters_created_tensors_and_plans_come_back(tmp_path: Path) -> None:
    base = make_base()
    plan = scaled()
    model = weft.MultiTaskModel(base, plan, example=images(1))
    model.add_task("a", weft.Classification(3))
    model.add_task("b", weft.Classification(3), sharing=weft.scale_bias(base))
    disturb(model)
    bank = Bank(tmp_path)
    bank.save(model)
    for chosen in ((), ("a",), ("b",)):
        loaded = bank.load(base, *chosen)
        for name in chosen or ("a", "b"):
            assert torch.equal(outputs(loaded, (x := images()))[name], outputs(model, x)[name])
        assert loaded.shared.keys() == model.shared.keys()
        for key, tensor in model.shared.items():
            assert torch.equal(loaded.shared[key], tensor)
            assert type(loaded.shared[key]) is type(tensor)
        again = loaded.sharing
        assert again.method == "scaled"
        assert again.options == {"sites": ["0"], "rate": 0.5}
        assert (again.adapters, again.groups, again.phases, again.refused) == (
            plan.adapters,
            plan.groups,
            plan.phases,
            plan.refused,
        )
        assert {k: c.trains for k, c in again.created.items()} == {"basis": True, "fixed": False}
    assert_same_model(bank.load(base, sharing=plan), model, images())
    with pytest.raises(BankError, match=r"is another one. Hand in that plan, or none"):
        bank.load(base, sharing=scaled({"rate": 0.1}))
    added = bank.load(base, "b")
    bank.add_to(added, "a")
    assert added.plan("a") is added.sharing


def test_insertions_without_a_name_are_refused(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, scaled(), example=images(1))
    model.add_task("a", weft.Classification(3))
    with pytest.raises(BankError, match=r"Register it: weft.adapters.INSERTIONS\['my_name'\]"):
        Bank(tmp_path).save(model)


def test_plans_with_code_do_not_train_without_it(tmp_path: Path) -> None:
    base = make_base()
    bank = Bank(tmp_path)
    bank.save(make_model(base))
    loaded = bank.load(base)
    with pytest.raises(PlanError, match=r"sharing=weft.taps\(base, ...\)"):
        loaded.step({"a": images()})
    with pytest.raises(PlanError, match="does not store"):
        loaded.sharing.phases[0].prepare(loaded, {})
    loaded = bank.load(base, sharing=weft.taps(base))
    assert loaded.step({"a": images()}).penalty == 0
    # A plan with other options is the model's default, but not what these tasks were made by.
    loaded = bank.load(base, sharing=weft.taps(base, penalty=0.7))
    assert loaded.plan("a") is not loaded.sharing
    assert loaded.plan("a") is loaded.plan("b")


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Phase) if "Callable" in str(f.type)]
)
def test_plans_with_a_function_in_a_phase_are_stored_without_it(tmp_path: Path, field: str) -> None:
    base = make_base()
    phase = dataclasses.replace(Phase("train"), **{field: lambda *_: None})
    plan = dataclasses.replace(weft.bias_only(base), phases=(phase,))
    model = weft.MultiTaskModel(base, plan, example=images(1))
    model.add_task("a", weft.Classification(3))
    bank = Bank(tmp_path)
    bank.save(model)
    loaded = bank.load(base)
    assert_same_model(loaded, model, images())
    with pytest.raises(PlanError, match="does not store"):
        loaded.plan("a").phases[0].prepare(loaded, {})


def test_shared_states_are_kept_by_version(tmp_path: Path) -> None:
    base = make_base()
    model = make_model(base, "a", "b", method="hard_sharing")
    bank = Bank(tmp_path)
    bank.save(model)
    x = images()
    before = outputs(model, x)
    first = bank.info("a")["shared"]["sha256"]
    disturb(model)
    bank.save(model, "b")
    second = bank.info("b")["shared"]["sha256"]
    assert first != second
    assert torch.equal(outputs(bank.load(base, "a"), x)["a"], before["a"])
    assert torch.equal(outputs(bank.load(base, "b"), x)["b"], outputs(model, x)["b"])
    with pytest.raises(BankError, match="'a' and 'b' depend on different shared states"):
        bank.load(base)
    with pytest.raises(BankError, match="depends on the shared state"):
        bank.add_to(bank.load(base, "a"), "b")
    # A task on the untouched base does not go with one that needs a trained base.
    bank.save(make_model(base, "c", method="scale_bias"))
    with pytest.raises(BankError, match="the untrained base"):
        bank.load(base, "a", "c")
    with pytest.raises(BankError, match=r"trained on another base.*other values"):
        bank.add_to(bank.load(base, "a"), "c")
    with pytest.raises(BankError, match="depends on the shared state"):
        bank.add_to(bank.load(base, "c"), "a")

    states = tmp_path / "shared"
    assert len(list(states.iterdir())) == 2
    bank.remove("a")
    assert [p.stem for p in states.iterdir()] == [second]
    bank.remove("b")
    assert not list(states.iterdir())
    assert bank.tasks() == ("c",)
    assert not bank.verify(base)


def test_a_joint_plan_first_leaves_the_trained_values_of_the_base_open(tmp_path: Path) -> None:
    base = make_base()
    bank = Bank(tmp_path)
    bank.save(make_model(base, "a", method="hard_sharing"))
    assert any(mark.endswith("?") for mark in bank.base()["tensors"].values())
    assert not bank.verify(base)
    fingerprint = bank.base()["fingerprint"]
    bank.save(make_model(base, "b"))
    assert not any(mark.endswith("?") for mark in bank.base()["tensors"].values())
    assert bank.base()["fingerprint"] != fingerprint
    assert torch.is_tensor(outputs(bank.load(base, "a"), images())["a"])
    assert not bank.verify(base)


# ------------------------------------------------------------------------------ the rest


def test_tasks_keep_the_order_in_which_they_were_saved(tmp_path: Path) -> None:
    base = make_base()
    bank = Bank(tmp_path / "bank")
    assert bank.tasks() == ()
    assert (len(bank), "z" in bank) == (0, False)
    bank.save(make_model(base, "z", "m"))
    bank.save(make_model(base, "a"))
    bank.save(make_model(base, "z"))
    assert bank.tasks() == tuple(bank) == bank.load(base).task_names == ("z", "m", "a")
    assert len(bank) == 3
    assert "m" in bank
    assert "x" not in bank
    assert bank.load(base, "a", "z").task_names == ("a", "z")


def test_what_heads_read_comes_back(tmp_path: Path) -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.layer(x), "z": x}

    base = Structured()
    bank = Bank(tmp_path)
    for name, output in (("key", "y"), ("function", lambda o: o["y"])):
        model = weft.MultiTaskModel(
            base, weft.bias_only(base), example=torch.ones(1, 3), output=output
        )
        model.add_task(name, weft.Regression())
        bank.save(model)
    assert bank.load(base, "key").output == "y"
    with pytest.raises(BankError, match=r"a function.*output="):
        bank.load(base, "function")
    assert bank.load(base, output="y")(torch.ones(2, 3), task="function").shape == (2,)


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    base = make_base()
    model = make_model(base, "a", method="full_finetune")
    Bank(tmp_path).save(model)
    stored = load_file(tmp_path / "tasks" / "a" / "own.safetensors")
    assert all(torch.equal(stored[key], t) for key, t in model.tasks["a"].own.items())
    types = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert types <= {".json", ".safetensors", ""}


def test_facts_are_plain_values_and_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    base = make_base()
    model = make_model(base)
    facts = {"loss": float("nan"), "history": [{"epoch": 1, "name": 'ä\n"x"'}], "none": None}
    model.tasks["a"].facts.update(facts)
    bank = Bank(tmp_path)
    bank.save(model)
    found = bank.info("a")["facts"]
    assert str(found) == str({"seed": 0, **facts})
    for wrong in (torch.ones(1), {1: 2}, {"x": object()}):
        model.tasks["b"].facts["wrong"] = wrong
        with pytest.raises(BankError, match=r"facts of 'b'\['wrong'\]"):
            bank.save(model)
    del model.tasks["b"].facts["wrong"]
    assert str(bank.info("a")["facts"]) == str(found)


def test_an_empty_model_and_unknown_tasks_are_named(tmp_path: Path) -> None:
    base = make_base()
    bank = Bank(tmp_path / "bank")
    with pytest.raises(BankError, match="no tasks to save"):
        bank.save(weft.MultiTaskModel(base, weft.taps(base)))
    model = make_model(base, "flowers")
    with pytest.raises(TaskError, match="Close matches: flowers"):
        bank.save(model, "flower")
    with pytest.raises(BankError, match="no bank at"):
        bank.load(base)
    with pytest.raises(BankError, match="no bank at"):
        Bank(tmp_path / "bank", create=False)
    bank.save(model)
    for call in (bank.info, bank.remove, lambda t: bank.load(base, t), bank.ledger):
        with pytest.raises(BankError, match=r"no task 'flower'.*Close matches: flowers"):
            call("flower")
    with pytest.raises(TaskError, match="exists already"):
        bank.add_to(model, "flowers")
    bank.remove("flowers")
    with pytest.raises(BankError, match="holds no tasks"):
        bank.load(base)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": np.int64(4), "alpha": np.float32(8), "dropout": np.float32(0.1)}),
        ("paco", {"k": np.int64(3), "noise": np.float32(0.1), "seed": np.int64(1)}),
        ("bora", {"tau": np.float32(0.1), "r": np.int32(2)}),
        ("taps", {"budget": np.float32(0.5)}),
        ("disparse", {"sparsity": np.float64(0.5), "batches": np.int64(2)}),
    ],
)
def test_options_may_be_numbers_of_numpy(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(4, 6)
    plan = weft.method(method, base, **options)
    model = weft.MultiTaskModel(base, plan, example=x)
    model.add_task("a", weft.Classification(3))
    bank = weft.Bank(tmp_path)
    bank.save(model)
    for loaded in (bank.load(base), bank.load(base, sharing=plan)):
        assert torch.equal(loaded.eval()(x, task="a"), model.eval()(x, task="a"))
