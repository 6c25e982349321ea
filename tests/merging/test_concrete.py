"""What concrete merging does: laws of the mask and of the scales, its data, its precision."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_nets import Net, batches, make_base, model_of, tensors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.errors import DataError, TrainingError
from weft.merging import Figures, Merged, collapse, merge
from weft.merging import concrete as noisy
from weft.merging.concrete import _Masks
from weft.merging.entropy import Predictions, Stream

concrete = partial(noisy, progress=False)


def run(**options: Any) -> weft.MultiTaskModel:
    model = model_of(2)
    settings: dict[str, Any] = {"steps": 3, "scale_steps": 3, **options}
    return concrete(
        model, {t: batches(i) for i, t in enumerate(model.task_names)}, **settings
    ).model


def test_without_a_mask_and_learned_scales_it_is_task_arithmetic() -> None:
    expected = tensors(merge(model_of(2), scale=0.25).model)
    for name, tensor in tensors(run(masked=False, scale=0.25)).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_mask_that_is_open_everywhere_changes_nothing() -> None:
    # With huge logits every entry of the mask is 1, and 1 / mean(1) is 1.
    masks = _Masks({"w": torch.zeros(4, 3)}, 0.5, seed=0)
    masks.logits["w"] = torch.full((4, 3), 50.0)
    torch.testing.assert_close(masks.draw()["w"], torch.ones(4, 3))


def test_the_mask_is_the_relaxed_bernoulli_of_its_logits() -> None:
    x = torch.tensor([-2.0, 0.0, 1.5]).repeat(20000, 1)
    masks = _Masks({"w": x}, 0.5, seed=0)
    masks.logits["w"] = x
    mask = masks.draw()["w"]
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


@pytest.mark.parametrize("form", ["task_arithmetic", "layer_wise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_base_of_any_precision_is_merged_like_one_in_float32(
    dtype: torch.dtype, form: Any
) -> None:
    """Up to the rounding of the base and of the network's forward."""
    options: dict[str, Any] = {"form": form, "steps": 5, "scale_steps": 5, "seed": 3}
    found = []
    for kind in (torch.float32, dtype):
        model = model_of(2, dtype=torch.float32)
        weights = {n: t.to(dtype).to(kind) for n, t in model.state_dict().items()}
        model = model_of(2, dtype=kind)
        model.load_state_dict(weights)
        data = {t: [x.to(kind) for x, _ in batches(i)] for i, t in enumerate(model.task_names)}
        found.append(concrete(model, data, **options).base)
    plain, other = (dict(base.named_parameters()) for base in found)
    for name, tensor in other.items():
        assert tensor.dtype == dtype
        if dtype != torch.float64:  # other random draws there
            torch.testing.assert_close(tensor.float(), plain[name], atol=0.02, rtol=0.02)
        assert bool(torch.isfinite(tensor).all())


def test_logits_of_a_half_base_move_in_float32() -> None:
    model = model_of(2, dtype=torch.float16)
    masks = _Masks(dict(model.base.named_parameters()), 0.5, seed=0)
    assert {x.dtype for x in masks.logits.values()} == {torch.float32}
    data = {t: [x.half() for x, _ in batches(i)] for i, t in enumerate(model.task_names)}
    for tensor in tensors(concrete(model, data, steps=20, lr=0.5).model).values():
        assert bool(torch.isfinite(tensor).all())


def test_the_entropy_of_a_half_base_is_computed_in_float32() -> None:
    model = model_of(1, dtype=torch.float16).requires_grad_(False)
    x = torch.randn(8, 6).half()
    streams = {"t0": Stream([x], "t0", torch.device("cpu"))}
    found = Predictions(model, streams, diversity=0.0).loss(model.tensors("t0"))
    logs = model(x, task="t0").float().log_softmax(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -(logs.exp() * logs).sum(1).mean())


def test_a_result_that_is_not_finite_is_an_error() -> None:
    model = model_of(2)
    data = {t: batches(i) for i, t in enumerate(model.task_names)}
    bad = {**data, "t1": [(torch.full((4, 6), float("nan")), torch.zeros(4))]}
    with pytest.raises(TrainingError, match=r"predictions of 't1' is not finite"):
        concrete(model, bad, steps=1)
    half = model_of(2, dtype=torch.float16)
    with torch.no_grad():  # a weight that reaches no output: the entropy stays finite
        for name in half.task_names:
            half.tasks[name].own["first.bias"].fill_(-60000.0)
    halves = {t: [x.half() for x, _ in rows] for t, rows in data.items()}
    with pytest.raises(TrainingError, match=r"'first.bias' NaN or infinite"):
        concrete(half, halves, scale=1.0, masked=False)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_around_it(off: Any) -> None:
    expected = tensors(run(form="task_wise"))
    model = model_of(2)
    data = {t: batches(i) for i, t in enumerate(model.task_names)}
    with off():
        found = concrete(model, data, form="task_wise", steps=3, scale_steps=3).model
    assert all(torch.equal(t, expected[n]) for n, t in tensors(found).items())


# ------------------------------------------------------------------------ data


class Dicts(Net):
    """A base that takes its input by name."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels)


def test_batches_may_have_targets_or_not() -> None:
    expected = tensors(run(steps=2))
    for change in (
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, torch.zeros(3)],  # targets are not looked at
        lambda x: ((x,), None),
    ):
        model = model_of(2)
        data = {t: [change(x) for x, _ in batches(i)] for i, t in enumerate(model.task_names)}
        found = tensors(concrete(model, data, steps=2).model)
        assert all(torch.equal(t, expected[n]) for n, t in found.items())


@pytest.mark.parametrize("labels", [True, False])
def test_inputs_may_go_by_name(labels: bool) -> None:
    torch.manual_seed(0)
    base = Dicts()
    example = {"pixels": torch.zeros(2, 6)}
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=example)
    model.add_task("a", weft.Classification(3))
    batch = {"pixels": torch.randn(8, 6)} | ({"labels": torch.zeros(8)} if labels else {})
    concrete(model, {"a": [batch]}, steps=1)


def test_a_loader_starts_again_and_an_iterator_says_that_it_ended() -> None:
    model = model_of(1)
    x = torch.randn(20, 6)
    concrete(model, {"t0": DataLoader(TensorDataset(x), batch_size=8)}, steps=9)
    concrete(model, {"t0": itertools.repeat(x)}, steps=9)
    with pytest.raises(DataError, match="only once, and ended after 5 batches"):
        concrete(model, {"t0": iter([x] * 5)}, steps=9)
    with pytest.raises(DataError, match="'t0' is empty"):
        concrete(model, {"t0": iter(())}, steps=9)


# --------------------------------------------------------------- as a rule, and from a bank


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let merge's concrete take few steps; a call may say nothing else but this."""

    def few(
        source: Any, data: Any, tasks: Any, *, base: Any = None, progress: bool = True
    ) -> Merged:
        return noisy(source, data, tasks, base=base, progress=progress, steps=3)

    monkeypatch.setattr(sys.modules["weft.merging.merge"], "concrete", few)
    return few


@pytest.mark.usefixtures("short")
def test_as_a_rule_of_merge_it_is_concrete_with_its_defaults() -> None:
    model = model_of(3)
    data = {t: batches(i) for i, t in enumerate(model.task_names)}
    found = merge(model, ["t2", "t0"], how="concrete", data=data, progress=False)
    expected = concrete(model, data, ["t2", "t0"], steps=3)
    assert found.model.task_names == ("t2", "t0")
    assert (found.how, found.scale) == (expected.how, expected.scale)
    for name, tensor in tensors(found.model).items():
        assert torch.equal(tensor, tensors(expected.model)[name])


@pytest.mark.usefixtures("short")
def test_a_bank_is_merged_like_the_model_that_it_stores(tmp_path: Path) -> None:
    model = model_of(2)
    data = {t: batches(i) for i, t in enumerate(model.task_names)}
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model)
    expected = tensors(concrete(model, data, steps=3).model)
    for found in (
        concrete(bank, data, base=make_base(), steps=3),
        merge(bank, base=make_base(), how="concrete", data=data, progress=False),
    ):
        assert all(torch.equal(t, expected[n]) for n, t in tensors(found.model).items())


def test_progress_is_shown_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    data = {t: batches(i) for i, t in enumerate(("t0", "t1"))}
    noisy(model_of(2), data, form="task_wise", steps=2, scale_steps=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "learned the mask in 2 steps" in shown.err
    assert "learned the scales in 3 steps" in shown.err
    concrete(model_of(2), data, steps=2)
    assert capsys.readouterr().err == ""


def test_outputs_that_are_no_classes_are_refused() -> None:
    torch.manual_seed(0)
    base = Net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 6))
    model.add_task("t", weft.Regression(1))
    with pytest.raises(DataError, match="no class scores"):
        concrete(model, {"t": batches()}, steps=1)
    with pytest.raises(DataError, match="is empty"):
        concrete(model, {"t": []}, steps=1)
