"""Phases: what trains when, on which data, at which price, and what runs between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
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
from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase, Sharing
from weft.errors import DataError, TrainingError
from weft.training import Epoch
from weft.training.schedule import phase_of_each_epoch, rate_factor


def _plan(*phases: Phase, plan: Sharing) -> Sharing:
    return replace(plan, phases=phases)


# ------------------------------------------------------------------- laid over the epochs


@pytest.mark.parametrize("epochs", [5, 6, 7, 10, 31, 100])
def test_phases_fill_the_epochs_in_order(epochs: int) -> None:
    phases = (Phase("w", epochs=3), Phase("s", share=0.7), Phase("h", share=0.3))
    names = [p.name for p in phase_of_each_epoch(phases, epochs, "m")]
    assert len(names) == epochs
    assert names == sorted(names, key="wsh".index)
    assert names.count("w") == 3
    assert abs(names.count("h") - 0.3 * (epochs - 3)) <= 1
    assert names.count("s") >= 1
    assert names.count("h") >= 1


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 100.0), (0.01, 0.01, 5.0), (1.0, 1.0, 1.0, 1.0)])
def test_every_phase_gets_an_epoch(shares: tuple[float, ...]) -> None:
    phases = tuple(Phase(str(i), share=s) for i, s in enumerate(shares))
    for epochs in range(len(shares), 20):
        course = phase_of_each_epoch(phases, epochs, "m")
        assert len(course) == epochs
        assert list(dict.fromkeys(course)) == list(phases)


def test_exact_phases_leave_the_rest_to_the_last() -> None:
    phases = (Phase("a", epochs=1), Phase("b", epochs=2))
    assert [p.name for p in phase_of_each_epoch(phases, 5, "m")] == list("abbbb")
    with pytest.raises(TrainingError, match="at least 3 epochs, found epochs=2"):
        phase_of_each_epoch(phases, 2, "m")


def test_too_few_epochs_for_a_plan_are_refused_before_training() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base))
    before = everything(model)
    with pytest.raises(TrainingError, match=r"'taps' has 3 phases .* at least 5 epochs"):
        weft.fit(model, {"a": in_order(images(16, 3, 1))}, epochs=4, progress=False)
    assert_same_bits(everything(model), before)


# -------------------------------------------------------------------------- learning rates


def test_the_rate_rises_and_falls() -> None:
    factor = rate_factor("cosine", [20], 4)
    rates = [factor(i) for i in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.0 < rates[-1] < 0.02
    assert factor(20) == pytest.approx(0.0)
    assert [rate_factor("constant", [5], 2)(i) for i in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_every_step_uses_the_rate_of_the_schedule_for_each_group() -> None:
    used: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            used.append([g["lr"] for g in self.param_groups])
            super().step(closure)

    base = dense_net()
    model = model_of(base, weft.bias_only(base))
    history = weft.fit(
        model,
        {"a": in_order(vectors(40, 3, 1))},
        epochs=2,
        lr=0.1,
        head_lr=0.5,
        accumulate=2,
        optimizer=lambda groups: Watched(groups, momentum=0.9),
        progress=False,
    )
    factor = rate_factor("cosine", [6], 0)
    assert used == [
        [pytest.approx(0.1 * factor(i)), pytest.approx(0.5 * factor(i))] for i in range(6)
    ]
    assert [r["lr"] for r in history["a"]] == [0.1 * factor(2), 0.1 * factor(5)]


# ------------------------------------------------------------------------ general phases


def test_frozen_patterns_freeze_own_and_shared_tensors_and_later_release_them() -> None:
    base = dense_net()
    plan = weft.hard_sharing(base, own="top", fraction=0.4)
    shared = sorted(plan.train_shared & dict(base.named_parameters()).keys())
    own = sorted(plan.patches.keys() & dict(base.named_parameters()).keys())
    phases = Phase("one", freeze=("0.*", "1.*"), epochs=2), Phase("two", freeze=("3.*",))
    model = model_of(base, _plan(*phases, plan=plan))
    states = [everything(model)]
    data = {t: in_order(vectors(24, 3, i)) for i, t in enumerate("ab")}
    keep = [lambda epoch: states.append(everything(epoch.model))]
    weft.fit(model, data, epochs=4, lr=0.1, weight_decay=0.1, callbacks=keep, progress=False)
    names = [f"base.{n}" for n in shared]
    names += [f"tasks.{t}.own.{n.replace('.', '/')}" for t in "ab" for n in own]
    for epoch in range(4):
        moved = {n for n in names if not torch.equal(states[epoch][n], states[epoch + 1][n])}
        free = "3" if epoch < 2 else "01"
        assert moved == {n for n in names if any(f"{s}{d}" in n for d in free for s in (".",))}


def test_slices_of_the_data_are_disjoint_and_complete() -> None:
    seen: dict[str, list[int]] = {"one": [], "two": []}
    course = iter(["one"] * 2 + ["two"] * 2)
    current = [""]

    class Indexed(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            seen[current[0]].append(index)
            return super().__getitem__(index)

    base = dense_net()
    phases = Phase("one", epochs=2, data=(0.0, 0.3)), Phase("two", data=(0.3, 1.0))
    model = model_of(base, _plan(*phases, plan=weft.full_finetune(base)))
    data = Indexed(*vectors(41, 3, 1).tensors)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    current[0] = next(course)

    def advance(_: Epoch) -> None:
        current[0] = next(course, "")

    weft.fit(model, {"a": loader}, epochs=4, callbacks=[advance], progress=False)
    one, two = set(seen["one"]), set(seen["two"])
    assert not one & two
    assert one | two == set(range(41))
    assert len(one) == 12


@pytest.mark.parametrize(
    "loader",
    [
        in_order(vectors(16, 3, 1)),
        DataLoader(vectors(16, 3, 1), batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(vectors(3, 3, 1), batch_size=2, drop_last=True),
        DataLoader(
            vectors(16, 3, 1), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 16, 16)
        ),
    ],
)
def test_data_that_cannot_be_sliced_is_refused(loader: Iterable[object]) -> None:
    base = dense_net()
    plan = _plan(Phase("half", data=(0.0, 0.5)), plan=weft.full_finetune(base))
    model = model_of(base, plan)
    with pytest.raises(DataError, match="'a'"):
        weft.fit(model, {"a": loader}, epochs=1, progress=False)


def test_penalties_are_scaled_by_the_phase() -> None:
    base = conv_net()
    phases = Phase("half", epochs=1, penalty=0.5), Phase("double", penalty=2.0)
    plan = _plan(*phases, plan=weft.taps(base, penalty=1.0, warmup=0, harden=0.0))
    model = model_of(base, plan)
    history = weft.fit(model, {"a": in_order(images(16, 3, 1))}, epochs=2, lr=1e-9, progress=False)
    assert [r["penalty"] for r in history["a"]] == pytest.approx([0.5 * 0.15, 2.0 * 0.15])


def test_preparation_runs_before_its_phase_on_the_data_of_its_tasks() -> None:
    calls: list[tuple[int, list[str], int, bool]] = []
    rows: list[int] = []

    def prepare(model: MultiTaskModel, data: Mapping[str, Iterable[object]]) -> None:
        batches = sum(1 for loader in data.values() for _ in loader)
        calls.append((len(rows), list(data), batches, model.training))
        with torch.no_grad():
            for task in data:
                model.tasks[task].own["0.weight"].fill_(0.25)

    base = dense_net()
    phases = Phase("one", epochs=1), Phase("two", prepare=prepare, freeze=("0.weight",))
    model = model_of(base, _plan(*phases, plan=weft.full_finetune(base)), tasks=["a", "b"])
    model.add_task("c", weft.Classification(3), sharing=weft.full_finetune(base))
    data = {t: shuffled(vectors(24, 3, i)) for i, t in enumerate("abc")}
    weft.fit(model, data, epochs=3, callbacks=[lambda e: rows.append(e.number)], progress=False)
    assert calls == [(1, ["a", "b"], 6, False)]
    assert bool((model.tasks["a"].own["0.weight"] == 0.25).all())
    assert not bool((model.tasks["c"].own["0.weight"] == 0.25).any())


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 5])]
)
def test_transitions_see_gradients_and_all_own_tensors(
    every: int | None, expected: list[int]
) -> None:
    """Each of two phases is an epoch of 3 optimiser steps; steps count from a phase's start."""
    calls: list[int] = []
    steps = [0]

    def transition(
        model: MultiTaskModel,
        own: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Mapping[str, Tensor | None]],
    ) -> None:
        calls.append(steps[0])
        assert list(own) == ["a", "b"]
        assert own["a"].keys() == gradients["a"].keys()
        assert gradients["a"]["1.running_mean"] is None
        gradient = gradients["a"]["0.weight"]
        assert gradient is not None
        assert bool((gradient != 0).any())
        own["a"]["0.weight"].mul_(1.0)
        assert not torch.is_grad_enabled()
        assert model.tasks["a"].own["0.weight"] is own["a"]["0.weight"]

    class Counting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            steps[0] += 1
            super().step(closure)

    base = conv_net()
    phases = [Phase(name, transition=transition, every=every) for name in ("one", "two")]
    model = model_of(base, _plan(*phases, plan=weft.full_finetune(base)))
    data = {t: in_order(images(40, 3, i)) for i, t in enumerate("ab")}
    weft.fit(
        model,
        data,
        epochs=2,
        accumulate=2,
        optimizer=lambda groups: Counting(groups, momentum=0.9),
        progress=False,
    )
    assert calls == expected
