"""Merging rules against formulas of their own, and what the result is."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import Net, composed, data, make_base, model_of
from torch import nn

import weft
from weft.core.sites import named_tensors
from weft.errors import PlanError
from weft.merging import merge, ties, trim

PLANS = {
    "full_finetune": weft.full_finetune,
    "scale_bias": weft.scale_bias,
    "bias_only": weft.bias_only,
}


RULES = ["average", "task_arithmetic", "ties"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", RULES)
def test_one_task_merged_is_that_task(how: Any, plan: str, dtype: torch.dtype) -> None:
    model = model_of(1, PLANS[plan], dtype)
    with torch.no_grad():  # so far from the base that base + (task - base) would round
        for tensor in model.tasks["t0"].own.values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 + 9 * torch.rand_like(tensor))
    merged = merge(model, how=how)
    assert merged.scale == 1.0
    folded = dict(named_tensors(model.fold("t0")))
    for name, tensor in named_tensors(merged.base):
        assert torch.equal(tensor, folded[name])
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(merged.model(x, task="t0"), model(x, task="t0"))


def test_one_task_is_not_trimmed_at_any_scale_and_chosen_like_others() -> None:
    model = model_of(1)
    plain, trimmed = (merge(model, how=how, scale=0.4) for how in ("task_arithmetic", "ties"))
    for name, tensor in named_tensors(plain.base):
        assert torch.equal(tensor, dict(named_tensors(trimmed.base))[name])
    found = merge(model, how="ties", scale="choose", data=data(model), scales=[0.1, 1.0])
    assert found.scale == 1.0
    x = torch.randn(5, 6)
    assert torch.equal(found.model(x, task="t0"), model(x, task="t0"))


def test_the_rules_are_their_formulas() -> None:
    model = model_of()
    base = {n: t.detach() for n, t in named_tensors(model.base)}
    trained = {n for n, _ in model.base.named_parameters()}
    vectors = [
        {n: composed(model, t)[n] - base[n] for n in base if base[n].is_floating_point()}
        for t in model.task_names
    ]
    mean = {n: torch.stack([v[n] for v in vectors]).mean(0) for n in vectors[0]}
    for how, scale, factor in (("average", 1.0, 1.0), ("task_arithmetic", 0.4, 0.4 * 3)):
        merged = merge(model, how=how, scale=scale)  # type: ignore[arg-type]
        found = dict(named_tensors(merged.base))
        for name, tensor in base.items():
            expected = tensor
            if tensor.is_floating_point():
                expected = tensor + (factor if name in trained else 1.0) * mean[name]
            torch.testing.assert_close(found[name], expected)


def test_average_does_not_depend_on_the_order_and_scale_0_is_the_base() -> None:
    model = model_of()
    one, other = merge(model, how="average"), merge(model, ["t2", "t0", "t1"], how="average")
    for name, tensor in named_tensors(one.base):
        torch.testing.assert_close(tensor, dict(named_tensors(other.base))[name])
    nothing = merge(model, scale=0.0)
    base = dict(model.base.named_parameters())
    assert all(torch.equal(t, base[n]) for n, t in nothing.base.named_parameters())


def by_hand(vectors: np.ndarray, density: float) -> np.ndarray:
    """TIES in numpy, entry by entry; tasks in rows."""
    kept = vectors.copy()
    for row in kept:
        order = np.argsort(-np.abs(row), kind="stable")
        row[order[max(1, round(density * len(row))) :]] = 0
    merged = np.zeros(vectors.shape[1])
    for i in range(vectors.shape[1]):
        sign = np.sign(kept[:, i].sum())
        agree = [v for v in kept[:, i] if v != 0 and np.sign(v) == sign]
        merged[i] = np.mean(agree) if agree else 0.0
    return merged


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_ties_is_its_three_steps(density: float) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 30))
    split = [{"a": torch.tensor(v[:10]).view(2, 5), "b": torch.tensor(v[10:])} for v in vectors]
    found = ties(lambda: iter((str(i), v) for i, v in enumerate(split)), density)
    flat = torch.cat([found["a"].flatten(), found["b"]]).numpy()
    np.testing.assert_allclose(flat, by_hand(vectors, density))


def test_a_worked_example_of_ties() -> None:
    # Kept are the two largest of each; the first entry elects +, the second -, the third nothing.
    tasks = [torch.tensor([3.0, -2.0, 0.1, 0.0]), torch.tensor([1.0, 0.5, -4.0, 0.0]),
             torch.tensor([-2.0, 0.2, 4.0, 0.0])]  # fmt: skip
    found = ties(lambda: iter((str(i), {"w": t}) for i, t in enumerate(tasks)), 0.5)
    torch.testing.assert_close(found["w"], torch.tensor([2.0, -2.0, 0.0, 0.0]))
    torch.testing.assert_close(trim({"w": tasks[0]}, 0.25)["w"], torch.tensor([3.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    vectors = torch.tensor(np.random.default_rng(2).normal(size=(5, 20))).to(dtype)
    found = ties(lambda: iter((str(i), {"w": v}) for i, v in enumerate(vectors)), 0.6)["w"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_hand(vectors.double().numpy(), 0.6), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", RULES)
def test_a_base_in_half_precision_rounds_once(how: Any, dtype: torch.dtype) -> None:
    model = model_of(5, dtype=dtype)
    base = {n: t.detach().double() for n, t in model.base.named_parameters()}
    rows = torch.stack(
        [
            torch.cat([(composed(model, t)[n].double() - base[n]).flatten() for n in base])
            for t in model.task_names
        ]
    )
    direction = {
        "average": rows.mean(0),
        "task_arithmetic": rows.sum(0),
        "ties": torch.tensor(by_hand(rows.numpy(), 0.5)),
    }[how]
    found = merge(model, how=how, scale=0.7, density=0.5 if how == "ties" else None).base
    flat = torch.cat([t.detach().flatten() for t in found.parameters()])
    start = torch.cat([t.flatten() for t in base.values()])
    assert torch.equal(flat, (start + 0.7 * direction).to(dtype))


@pytest.mark.parametrize("plan", PLANS)
def test_what_every_plan_owns_can_be_merged(plan: str) -> None:
    model = model_of(2, PLANS[plan])
    merged = merge(model, how="average")
    base = dict(model.base.named_parameters())
    folded = [dict(model.fold(t).named_parameters()) for t in model.task_names]
    for name, tensor in merged.base.named_parameters():
        expected = base[name] + sum(f[name] - base[name] for f in folded) / 2
        torch.testing.assert_close(tensor, expected)


def test_low_rank_additions_are_folded_first() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model = weft.MultiTaskModel(base, weft.lora(base, r=2), example=torch.zeros(2, 6))
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(3))
        with torch.no_grad():
            for tensor in model.tasks[name].own.values():
                tensor.add_(0.3 * torch.rand_like(tensor))
    merged = merge(model, how="average")
    folded = [dict(model.fold(t).named_parameters()) for t in ("a", "b")]
    for name, tensor in merged.base.named_parameters():
        torch.testing.assert_close(tensor, (folded[0][name] + folded[1][name]) / 2)


def test_ties_of_weights_stay_and_the_model_is_not_changed() -> None:
    model = model_of()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    merged = merge(model, scale=0.3)
    assert merged.base.first.weight is merged.base.again.weight
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    head = merged.model.head("t0")
    assert head is not model.head("t0")


def test_the_result_is_an_ordinary_model(tmp_path: Path) -> None:
    model = model_of()
    merged = merge(model, scale=0.3)
    bank = weft.Bank(tmp_path / "bank")
    bank.save(merged.model)
    loaded = bank.load(merged.base).eval()
    x = torch.randn(4, 6)
    assert torch.equal(loaded(x, task="t1"), merged.model(x, task="t1"))
    weft.report(merged.model, tmp_path / "page.html")
    again = merge(bank.load(merged.base), how="average")  # heads need no example
    assert torch.equal(again.model.eval()(x, task="t1"), loaded(x, task="t1"))


def test_memory_does_not_grow_with_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(6)
    alive, most = [0], [0]
    fold = weft.MultiTaskModel.fold

    def counted(self: weft.MultiTaskModel, task: str) -> nn.Module:
        plain = fold(self, task)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(plain, lambda: alive.__setitem__(0, alive[0] - 1))
        return plain

    monkeypatch.setattr(weft.MultiTaskModel, "fold", counted)
    merge(model, how="ties", scale=1.0)
    assert most[0] <= 2


def test_infinite_entries_that_no_task_changes_stay() -> None:
    """As in the buffers of causal attention."""
    base = Net()
    base.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 6))
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(3))
    for how in RULES:
        assert torch.equal(merge(model, how=how).base.mask, base.mask)  # type: ignore[arg-type]


def inserted(base: nn.Module) -> weft.Sharing:
    return weft.scale_bias(base, where="layers")


def test_what_adds_tensors_to_the_base_is_refused_by_name() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU())
    model = weft.MultiTaskModel(base, inserted(base), example=torch.zeros(2, 6))
    model.add_task("t", weft.Classification(2))
    with pytest.raises(PlanError, match=r"'t' cannot be merged.*first '0.bias'"):
        merge(model)


# --------------------------------------------------------------------- sources


@pytest.fixture
def bank(tmp_path: Path) -> weft.Bank:
    found = weft.Bank(tmp_path / "bank")
    found.save(model_of())
    return found


@pytest.mark.parametrize("tasks", [None, ["t2", "t0"], "t1"])
def test_a_bank_is_merged_like_the_model_that_it_stores(bank: weft.Bank, tasks: Any) -> None:
    found = weft.merge(bank, tasks, base=make_base(), how="ties")
    expected = weft.merge(model_of(), tasks, how="ties")
    assert found.model.task_names == expected.model.task_names
    for name, tensor in named_tensors(expected.base):
        assert torch.equal(tensor, dict(named_tensors(found.base))[name])


def test_a_name_is_one_task_and_not_its_letters() -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 6))
    for name in ("a", "b", "ab"):
        model.add_task(name, weft.Classification(3))
    assert merge(model, "ab").model.task_names == ("ab",)
    assert merge(model, iter(["b", "a"])).model.task_names == ("b", "a")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).relu()


def test_a_task_that_skips_a_part_of_the_base_is_refused() -> None:
    base, x = nn.Sequential(Block(), Block()), torch.randn(3, 4)
    model = weft.MultiTaskModel(base, weft.adashare(base, example=x), example=x)
    for task in "ab":
        model.add_task(task, weft.Classification(2))
    for key, tensor in model.tasks["b"].own.items():
        if key.endswith("execute"):
            tensor.zero_()
    with pytest.raises(PlanError, match=r"'b' cannot be merged: folding it drops .*0.linear"):
        merge(model.eval(), scale=0.3)
