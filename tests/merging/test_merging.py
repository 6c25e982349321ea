"""Merging rules against formulas of their own, and what the result is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.core.sites import named_tensors
from weft.errors import ConfigError, DataError, PlanError, TaskError
from weft.merging import Figures, collapse, concrete, merge, ties, trim
from weft.merging.concrete import _mask


class Net(nn.Module):
    """Tied weights, batch normalisation, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.norm(self.first(x)).relu())
        return out


def model_of(
    tasks: int = 3, plan: Callable[[nn.Module], weft.Sharing] = weft.full_finetune
) -> weft.MultiTaskModel:
    """Tasks whose own tensors were moved at random."""
    torch.manual_seed(0)
    base = Net()
    model = weft.MultiTaskModel(base, plan(base), example=torch.zeros(2, 6))
    with torch.no_grad():
        for i in range(tasks):
            model.add_task(f"t{i}", weft.Classification(3))
            for tensor in model.tasks[f"t{i}"].own.values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.rand_like(tensor))
    return model.eval()


def composed(model: weft.MultiTaskModel, task: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model.tensors(task))


def batches(seed: int = 0, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, 6, generator=generator),
            torch.randint(0, 3, (rows,), generator=generator),
        )
        for _ in range(2)
    ]


def data(model: weft.MultiTaskModel) -> dict[str, Any]:
    """Batches whose targets are what the task itself answers."""
    found = {}
    for i, task in enumerate(model.task_names):
        with torch.no_grad():
            found[task] = [(x, model(x, task=task).argmax(1)) for x, _ in batches(i)]
    return found


PLANS = {
    "full_finetune": weft.full_finetune,
    "scale_bias": weft.scale_bias,
    "bias_only": weft.bias_only,
}


@pytest.mark.parametrize("how", ["average", "task_arithmetic", "ties"])
@pytest.mark.parametrize("plan", ["full_finetune", "scale_bias"])
def test_one_task_merged_is_that_task(how: Any, plan: str) -> None:
    model = model_of(1, PLANS[plan])
    merged = merge(model, how=how, density=1.0)
    assert merged.scale == 1.0
    x = torch.randn(5, 6)
    torch.testing.assert_close(merged.model(x, task="t0"), model(x, task="t0"))


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


def test_a_scale_is_chosen_on_validation_with_the_baseline_beside_it() -> None:
    model = model_of()
    found = merge(model, how="ties", scale="choose", data=data(model), scales=[0.2, 0.6, 1.0])
    means = {s: np.mean(list(tasks.values())) for s, tasks in found.scores.items()}
    assert set(means) == {0.2, 0.6, 1.0}
    assert means[found.scale] == max(means.values())
    assert set(found.baseline) == set(means)
    scores = weft.evaluate(found.model, data(model))
    assert {t: v["accuracy"] for t, v in scores.items()} == found.scores[found.scale]
    plain = merge(model, data=data(model), scales=[0.1, 0.2])
    assert plain.baseline == {}
    if plain.scale == 0.2:
        assert "try larger" in plain.warnings[0]


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


def inserted(base: nn.Module) -> weft.Sharing:
    return weft.scale_bias(base, where="layers")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"how": "soup"}, ConfigError, "average, task_arithmetic, ties"),
        ({"density": 0.0}, ConfigError, "density"),
        ({"scale": float("nan")}, ConfigError, "finite"),
        ({"scale": "best"}, ConfigError, "'choose'"),
        ({"scale": "choose"}, DataError, "has none"),
        ({"tasks": ["t0", "t9"]}, TaskError, "no task 't9'"),
        ({"tasks": ["t0", "t0"]}, TaskError, "twice"),
        ({"tasks": []}, TaskError, "no task to merge"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        merge(model_of(), **options)


def test_what_adds_tensors_to_the_base_is_refused_by_name() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU())
    model = weft.MultiTaskModel(base, inserted(base), example=torch.zeros(2, 6))
    model.add_task("t", weft.Classification(2))
    with pytest.raises(PlanError, match=r"'t' cannot be merged.*first '0.bias'"):
        merge(model)


# ------------------------------------------------------------------- concrete


def run(**options: Any) -> weft.MultiTaskModel:
    model = model_of(2)
    settings: dict[str, Any] = {"steps": 3, "scale_steps": 3, **options}
    return concrete(
        model, {t: batches(i) for i, t in enumerate(model.task_names)}, **settings
    ).model


def tensors(model: weft.MultiTaskModel) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in model.base.named_parameters()}


def test_without_a_mask_and_learned_scales_it_is_task_arithmetic() -> None:
    expected = tensors(merge(model_of(2), scale=0.25).model)
    for name, tensor in tensors(run(masked=False, scale=0.25)).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_mask_that_is_open_everywhere_changes_nothing() -> None:
    # With huge logits every entry of the mask is 1, and 1 / mean(1) is 1.
    logits = {"w": torch.full((4, 3), 50.0)}
    mask = _mask(logits, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mask["w"], torch.ones(4, 3))


def test_the_mask_is_the_relaxed_bernoulli_of_its_logits() -> None:
    x = torch.tensor([-2.0, 0.0, 1.5]).repeat(20000, 1)
    mask = _mask({"w": x}, 0.5, torch.Generator().manual_seed(0))["w"]
    # P(m > 1/2) = P(logit(u) > -x) = sigmoid(x), whatever the temperature.
    torch.testing.assert_close((mask > 0.5).float().mean(0), x[0].sigmoid(), atol=0.015, rtol=0)


@pytest.mark.parametrize("form", ["task_arithmetic", "task_wise", "layer_wise"])
def test_a_seed_decides_everything_and_nothing_else_moves(form: str) -> None:
    one, again, other = run(form=form), run(form=form), run(form=form, seed=1)
    assert all(torch.equal(t, tensors(again)[n]) for n, t in tensors(one).items())
    assert any(not torch.equal(t, tensors(other)[n]) for n, t in tensors(one).items())


@pytest.mark.parametrize("form", ["task_wise", "layer_wise"])
def test_learned_scales_stay_in_bounds_and_lower_the_entropy(form: str) -> None:
    model = model_of(2)
    base = dict(model.base.named_parameters())
    data = {t: batches(i) for i, t in enumerate(model.task_names)}
    found = concrete(model, data, form=form, masked=False, scale_steps=60, scale_lr=0.05)  # type: ignore[arg-type]
    before = merge(model, scale=0.3).model

    def entropy(which: weft.MultiTaskModel) -> float:
        total = 0.0
        with torch.no_grad():
            for task, rows in data.items():
                for x, _ in rows:
                    logs = which.eval()(x, task=task).log_softmax(1)
                    total -= float((logs.exp() * logs).sum(1).mean())
        return total

    assert entropy(found.model) < entropy(before)
    folded = [dict(model.fold(t).named_parameters()) for t in model.task_names]
    for name, tensor in found.base.named_parameters():
        most = sum((f[name] - base[name]).abs() for f in folded)
        assert bool(((tensor - base[name]).abs() <= most + 1e-5).all())


def test_the_mask_lowers_the_entropy() -> None:
    model = model_of(2)
    data = {t: [x for x, _ in batches(i)] for i, t in enumerate(model.task_names)}
    few = concrete(model, data, steps=1, lr=1e-9)
    many = concrete(model, data, steps=80, lr=0.1)

    def entropy(which: weft.MultiTaskModel) -> float:
        with torch.no_grad():
            logs = [
                which.eval()(x, task=t).log_softmax(1) for t, rows in data.items() for x in rows
            ]
        return sum(-float((part.exp() * part).sum(1).mean()) for part in logs)

    assert entropy(many.model) < entropy(few.model)


def test_collapse_is_told_and_only_collapse() -> None:
    assert "collapsed" in collapse(Figures(1.0, 0.9), Figures(0.1, 0.2))[0]
    assert collapse(Figures(1.0, 0.9), Figures(0.1, 0.88)) == ()
    assert collapse(Figures(1.0, 0.9), Figures(1.2, 0.2)) == ()


def test_a_collapse_is_found_where_it_happens() -> None:
    """One direction raises the first class for every input: the surest way to low entropy."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    nn.init.normal_(base[0].weight, std=0.3)
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 4))
    model.add_task("t", weft.Classification(4))
    with torch.no_grad():
        nn.init.eye_(model.head("t").linear.weight)  # type: ignore[union-attr,arg-type]
        model.tasks["t"].own["0.bias"] += torch.tensor([9.0, 0.0, 0.0, 0.0])
    data = {"t": [torch.randn(64, 4)]}
    options: dict[str, Any] = {"form": "layer_wise", "masked": False, "scale": 0.05}
    sure = concrete(model, data, scale_steps=100, scale_lr=0.05, **options)
    assert "collapsed" in sure.warnings[0]
    even = concrete(model, data, scale_steps=100, scale_lr=0.05, diversity=5.0, **options)
    assert even.warnings == ()


def test_outputs_that_are_no_classes_are_refused() -> None:
    torch.manual_seed(0)
    base = Net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 6))
    model.add_task("t", weft.Regression(1))
    with pytest.raises(DataError, match="no class scores"):
        concrete(model, {"t": batches()}, steps=1)
    with pytest.raises(DataError, match="has no data"):
        concrete(model, {}, steps=1)
    with pytest.raises(DataError, match="is empty"):
        concrete(model, {"t": []}, steps=1)
    with pytest.raises(ConfigError, match="layer_wise"):
        concrete(model, {"t": batches()}, form="both")  # type: ignore[arg-type]
