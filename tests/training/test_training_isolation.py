"""Law 2: fitting a task leaves every other task, the base and the caller as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from training_nets import (
    assert_same_bits,
    conv_net,
    dense_net,
    everything,
    images,
    in_order,
    model_of,
    shuffled,
    vectors,
)

import weft
from weft.errors import PlanError
from weft.registry import METHODS, Law, options_of

ISOLATED = [n for n, m in METHODS.items() if Law.TASKS_ARE_ISOLATED not in m.exceptions]
JOINT = [n for n in METHODS if n not in ISOLATED and "example" not in options_of(n)]
STATISTICS_KEPT = ["linear_probe", "bias_only"]


def _others(model: weft.MultiTaskModel, task: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in everything(model).items() if not n.startswith(f"tasks.{task}.")}


@pytest.mark.parametrize("name", ISOLATED)
def test_fitting_one_task_changes_no_bit_of_anything_else(name: str) -> None:
    base = conv_net()
    original = everything(base)
    model = model_of(base, weft.method(name, base))
    model.eval()
    x = torch.randn(5, 3, 6, 6)
    outputs = model(x, task="b").clone()
    others, own = _others(model, "a"), everything(model.tasks["a"])
    ledger = model.ledger("b")

    data = {"a": (shuffled(images(24, 3, 1)), shuffled(images(16, 3, 2)))}
    weft.fit(model, data, epochs=6, lr=0.1, weight_decay=0.01, progress=False)

    assert_same_bits(everything(base), original)
    assert_same_bits(_others(model, "a"), others)
    assert torch.equal(model(x, task="b"), outputs)
    assert model.ledger("b") == ledger
    after = everything(model.tasks["a"])
    moved = [n for n in after if n not in own or not torch.equal(after[n], own[n])]
    assert any(n.startswith("head.") for n in moved)
    assert name == "linear_probe" or any(n.startswith("own.") for n in moved)


@pytest.mark.parametrize("name", JOINT)
def test_a_subset_of_tasks_that_share_what_they_train_is_refused(name: str) -> None:
    base = conv_net()
    model = model_of(base, weft.method(name, base))
    before = everything(model)
    with pytest.raises(PlanError, match=r"would change b\. .*subset=True"):
        weft.fit(model, {"a": in_order(images(16, 3, 1))}, epochs=1, progress=False)
    assert_same_bits(everything(model), before)
    shared = {k: p.detach().clone() for k, p in model.shared_trainable().items()}
    weft.fit(model, {"a": in_order(images(16, 3, 1))}, epochs=1, subset=True, progress=False)
    assert any(not torch.equal(shared[k], p) for k, p in model.shared_trainable().items())


def test_tasks_with_a_plan_of_their_own_depend_on_trained_shared_tensors_too() -> None:
    base = conv_net()
    model = model_of(base, weft.hard_sharing(base), tasks=["a"])
    model.add_task("probe", weft.Classification(3), sharing=weft.linear_probe(base))
    with pytest.raises(PlanError, match="would change probe"):
        weft.fit(model, {"a": in_order(images(16, 3, 1))}, epochs=1, progress=False)


@pytest.mark.parametrize("plan", [weft.linear_probe, weft.scale_bias])
def test_a_task_with_a_plan_of_its_own_leaves_the_trained_base_alone(plan: object) -> None:
    base = conv_net()
    model = model_of(base, weft.hard_sharing(base), tasks=["a"])
    model.add_task("probe", weft.Classification(3), sharing=plan(base))  # type: ignore[operator]
    others = _others(model, "probe")
    weft.fit(model, {"probe": in_order(images(16, 3, 1))}, epochs=2, lr=0.1, progress=False)
    assert_same_bits(_others(model, "probe"), others)
    assert all(p.requires_grad for p in model.shared_trainable().values())


@pytest.mark.parametrize("name", STATISTICS_KEPT)
def test_statistics_that_a_task_does_not_own_never_move(name: str) -> None:
    base = conv_net()
    model = model_of(base, weft.method(name, base))
    before = {n: t for n, t in everything(model).items() if "running" in n}
    weft.fit(model, {"a": in_order(images(24, 3, 1))}, epochs=2, progress=False)
    assert_same_bits({n: t for n, t in everything(model).items() if "running" in n}, before)


@pytest.mark.parametrize("training", [True, False])
def test_fit_leaves_modes_flags_gradients_and_random_numbers_as_they_were(training: bool) -> None:
    base = conv_net()
    model = model_of(base, weft.full_finetune(base))
    model.train(training)
    model.tasks["b"].head.train(not training)
    frozen = model.tasks["a"].own["0.weight"].requires_grad_(False)
    kept = frozen.detach().clone()
    model.tasks["a"].own["6.weight"].grad = torch.full_like(model.tasks["a"].own["6.weight"], 1e9)
    modes = {n: m.training for n, m in model.named_modules() if ".own" not in n}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    train = shuffled(images(24, 3, 1))
    weft.fit(model, {"a": (train, train)}, epochs=1, lr=0.01, progress=False)

    assert {n: m.training for n, m in model.named_modules() if ".own" not in n} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.tasks["a"].parameters())
    assert torch.equal(model.tasks["a"].own["0.weight"], kept)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert model.tasks["a"].own["6.weight"].abs().max() < 100  # a stale gradient was not used


def test_heads_are_built_from_the_data_in_the_mode_of_the_model() -> None:
    base = conv_net()
    model = weft.MultiTaskModel(base, weft.scale_bias(base))
    model.add_task("a", weft.Classification(3))
    model.eval()
    weft.fit(model, {"a": shuffled(images(16, 3, 1))}, epochs=1, progress=False)
    assert not any(m.training for m in model.tasks["a"].head.modules())
    assert model(torch.randn(2, 3, 6, 6), task="a").shape == (2, 3)


def test_a_fit_is_the_same_whatever_was_drawn_before_it() -> None:
    results = []
    for draws in (0, 17):
        base = dense_net()
        model = weft.MultiTaskModel(base, weft.full_finetune(base))
        model.add_task("a", weft.Classification(3))
        torch.rand(draws)
        weft.fit(model, {"a": shuffled(vectors(24, 3, 1))}, epochs=2, progress=False)
        results.append(everything(model))
    assert_same_bits(*results)


def test_a_finished_task_can_be_fitted_again() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base, warmup=1, harden=0.5, penalty=30.0))
    data = {"a": (shuffled(images(24, 3, 1)), shuffled(images(16, 3, 2)))}
    weft.fit(model, data, epochs=6, lr=0.1, progress=False)
    ledger, others = model.ledger("a"), _others(model, "a")
    weft.fit(model, data, epochs=4, lr=0.1, progress=False)
    again = model.ledger("a")
    assert [r.shared for r in again.rows] == [r.shared for r in ledger.rows]
    assert [r.score for r in again.rows] == [r.score for r in ledger.rows]
    assert_same_bits(_others(model, "a"), others)
