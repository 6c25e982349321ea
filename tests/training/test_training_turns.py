"""Phases with turns, with a fresh start, and with a schedule of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_nets import (
    assert_same_bits,
    conv_net,
    dense_net,
    everything,
    images,
    in_order,
    model_of,
    vectors,
)

import weft
from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase, Turn
from weft.errors import ConfigError, DataError, PlanError, TrainingError
from weft.training.batches import Reader
from weft.training.history import Epoch
from weft.training.loaders import loaders_by_task
from weft.training.optimization import Groups
from weft.training.schedule import rate_factor


def _model(base: nn.Module, *phases: Phase) -> MultiTaskModel:
    return model_of(base, replace(weft.full_finetune(base), phases=phases), tasks=["a"])


class _Indexed(TensorDataset):
    """Says which rows were read."""

    def __init__(self, data: TensorDataset, seen: list[int]) -> None:
        super().__init__(*data.tensors)
        self._seen = seen

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self._seen.append(index)
        return super().__getitem__(index)


def test_turns_divide_every_epoch_by_their_slices_of_the_data() -> None:
    rows: list[int] = []
    at_step: list[tuple[frozenset[str], list[int]]] = []
    base = dense_net()
    turns = (
        Turn("weights", freeze=("3.*",), data=(0.0, 0.8)),
        Turn("last", train=("3.*",), heads=False, data=(0.8, 1.0)),
    )
    model = _model(base, Phase("both", turns=turns))
    names = {p: k for k, p in model.trainable("a").items()}
    names |= dict.fromkeys(model.head("a").parameters(), "head")  # type: ignore[union-attr]

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            parameters = [p for g in self.param_groups for p in g["params"]]
            trained = frozenset(names[p] for p in parameters if p.grad is not None)
            at_step.append((trained, rows.copy()))
            rows.clear()
            super().step(closure)

    loader = DataLoader(_Indexed(vectors(40, 3, 1), rows), batch_size=4, shuffle=True)
    weft.fit(model, {"a": loader}, epochs=2, optimizer=lambda g: Watched(g), progress=False)
    weights = frozenset({"0.weight", "0.bias", "1.weight", "1.bias", "head"})
    last = frozenset({"3.weight", "3.bias"})
    assert [trained for trained, _ in at_step] == ([weights] * 8 + [last] * 2) * 2
    first = [{row for _, seen in at_step[i : i + 8] for row in seen} for i in (0, 10)]
    second = [{row for _, seen in at_step[i : i + 2] for row in seen} for i in (8, 18)]
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert not first[0] & second[0]
    assert first[0] | second[0] == set(range(40))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_optimiser_step_mixes_turns(accumulate: int) -> None:
    """8 and 2 steps in threes are 3 and 1 optimiser steps."""
    steps = [0]

    class Counting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            gradients = {p.grad is None for g in self.param_groups for p in g["params"]}
            assert gradients == {True, False}
            steps[0] += 1
            super().step(closure)

    turns = Turn("1", train=("0.*",), data=(0.0, 0.8)), Turn("2", freeze=("0.*",), data=(0.8, 1.0))
    model = _model(dense_net(), Phase("both", turns=turns))
    loader = DataLoader(vectors(40, 3, 1), batch_size=4)
    weft.fit(
        model,
        {"a": loader},
        epochs=3,
        accumulate=accumulate,
        optimizer=lambda g: Counting(g),
        progress=False,
    )
    assert steps == [3 * (10 if accumulate == 1 else 4)]


def test_a_task_without_turns_reads_its_data_on_through_the_turns_of_others() -> None:
    rows: list[int] = []
    base = dense_net()
    turns = tuple(Turn(str(i), data=(i / 2, i / 2 + 0.5)) for i in range(2))
    model = _model(base, Phase("both", turns=turns))
    model.add_task("b", weft.Classification(3), sharing=weft.full_finetune(base))
    data = {
        "a": DataLoader(vectors(40, 3, 1), batch_size=4),
        "b": DataLoader(_Indexed(vectors(40, 3, 2), rows), batch_size=4, shuffle=True),
    }
    weft.fit(model, data, epochs=1, progress=False)
    assert sorted(rows) == list(range(40))


def test_a_loader_of_two_tasks_is_read_on_where_only_one_of_them_uses_it_later() -> None:
    rows: list[int] = []
    data = _Indexed(vectors(40, 3, 1), rows)
    batches = DataLoader(data, batch_size=4)
    both = loaders_by_task(
        DataLoader([(x, {"a": y, "b": y}) for x, y in vectors(40, 3, 1)], batch_size=4), ("a", "b")
    )
    reader = Reader({"a": 1, "b": 2})
    first = [step["a"][0] for step in reader.together(both, 3)]
    then = [step["a"][0] for step in reader.together({"a": both["a"], "b": batches}, 7)]
    assert torch.equal(torch.cat(first + then), vectors(40, 3, 1).tensors[0])
    assert rows == list(range(28))


def test_an_optimiser_that_mixes_schedules_is_refused() -> None:
    base = dense_net()
    restarting = replace(
        weft.full_finetune(base), phases=(Phase("one"), Phase("two", restart=True))
    )
    model = _model(base, Phase("train"))
    model.add_task("b", weft.Classification(3), sharing=restarting)
    data = {task: in_order(vectors(16, 3, 1)) for task in "ab"}

    def one_group(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)

    def with_an_empty_group(groups: Groups) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups)
        optimizer.add_param_group({"params": []})
        return optimizer

    with pytest.raises(ConfigError, match="parameters of a and b into one group"):
        weft.fit(model, data, epochs=2, optimizer=one_group, progress=False)
    weft.fit(model, data, epochs=2, optimizer=with_an_empty_group, progress=False)


def test_data_that_a_later_phase_cannot_cut_is_refused_before_the_first() -> None:
    epochs: list[Epoch] = []
    model = _model(dense_net(), Phase("all"), Phase("half", data=(0.0, 0.5)))
    with pytest.raises(DataError, match="splits the training data of 'a'"):
        weft.fit(
            model,
            {"a": in_order(vectors(16, 3, 1))},
            epochs=4,
            callbacks=[epochs.append],
            progress=False,
        )
    assert not epochs


def test_the_price_follows_the_turn() -> None:
    base = conv_net()
    turns = Turn("free", penalty=0.0, data=(0.0, 0.5)), Turn("dear", penalty=3.0, data=(0.5, 1.0))
    plan = weft.taps(base, penalty=1.0, warmup=0, harden=0.0)
    model = model_of(base, replace(plan, phases=(Phase("both", turns=turns),)), tasks=["a"])
    loader = DataLoader(images(16, 3, 1), batch_size=4)
    history = weft.fit(model, {"a": loader}, epochs=1, lr=1e-9, progress=False)
    assert history["a"][0]["penalty"] == pytest.approx(0.5 * 3.0 * 0.15)


def test_turns_replace_what_a_phase_says() -> None:
    with pytest.raises(PlanError, match="'both' has turns"):
        Phase("both", freeze=("0.*",), turns=(Turn("one"), Turn("two")))


def test_too_few_steps_for_the_turns_are_refused() -> None:
    model = _model(dense_net(), Phase("both", turns=(Turn("one"), Turn("two"))))
    with pytest.raises(TrainingError, match="2 turns, which 1 steps are too few"):
        weft.fit(model, {"a": in_order(vectors(8, 3, 1))}, epochs=1, progress=False)


def _fitted(*phases: Phase, epochs: int, **more: Path | list[object]) -> MultiTaskModel:
    model = _model(conv_net(), *phases)
    weft.fit(
        model,
        {"a": in_order(images(24, 3, 1))},
        epochs=epochs,
        lr=0.1,
        keep="last",
        progress=False,
        **more,  # type: ignore[arg-type]
    )
    return model


def test_a_phase_that_restarts_equals_a_run_of_its_own() -> None:
    """Tensors, running statistics, the head, momentum and the learning rate begin anew."""
    restarted = _fitted(Phase("one", epochs=2), Phase("two", restart=True), epochs=5)
    alone = _fitted(Phase("two"), epochs=3)
    goes_on = _fitted(Phase("one", epochs=2), Phase("two"), epochs=5)
    assert_same_bits(everything(restarted), everything(alone))
    left, right = everything(goes_on), everything(alone)
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_a_restart_keeps_what_is_frozen() -> None:
    states: list[dict[str, Tensor]] = []
    keep = [lambda epoch: states.append(everything(epoch.model))]
    phases = Phase("one", epochs=1), Phase("two", restart=True, freeze=("1.*",))
    start = everything(_model(conv_net()))
    _fitted(*phases, epochs=2, callbacks=keep)  # type: ignore[arg-type]
    one, two = states
    for name in ("1/weight", "1/bias"):
        assert torch.equal(one[f"tasks.a.own.{name}"], two[f"tasks.a.own.{name}"])
        assert not torch.equal(one[f"tasks.a.own.{name}"], start[f"tasks.a.own.{name}"])


class _Stop(Exception):
    """Ends a run."""


def test_an_interrupted_run_restarts_from_the_same_beginning(tmp_path: Path) -> None:
    phases = Phase("one", epochs=2), Phase("two", restart=True)
    whole = _fitted(*phases, epochs=4)
    for stop in (1, 2):

        def interrupt(epoch: Epoch, at: int = stop) -> None:
            if epoch.number == at:
                raise _Stop

        with pytest.raises(_Stop):
            _fitted(*phases, epochs=4, checkpoint=tmp_path, callbacks=[interrupt])
    resumed = _fitted(*phases, epochs=4, checkpoint=tmp_path)
    assert_same_bits(everything(resumed), everything(whole))


def test_rates_run_through_the_schedule_between_restarts() -> None:
    factor, long, short = (rate_factor("cosine", s, 1) for s in ([6, 4], [6], [4]))
    assert [factor(i) for i in range(10)] == [long(i) for i in range(6)] + [
        short(i) for i in range(4)
    ]


def test_a_restart_leaves_the_schedule_of_other_plans_alone() -> None:
    """Each task gets what it would get alone, values and rates."""
    data = {task: in_order(vectors(24, 3, i)) for i, task in enumerate("ab")}
    plans = {"a": (Phase("one", epochs=2), Phase("two", restart=True)), "b": (Phase("train"),)}

    def fitted(*tasks: str) -> tuple[MultiTaskModel, weft.History]:
        base = dense_net()
        model = model_of(base, weft.linear_probe(base), tasks=())
        for task in "ab":
            torch.manual_seed(1)
            plan = replace(weft.full_finetune(base), phases=plans[task])
            model.add_task(task, weft.Classification(3), sharing=plan)
        history = weft.fit(
            model, {t: data[t] for t in tasks}, epochs=5, lr=0.1, keep="last", progress=False
        )
        return model, history

    together, rows = fitted("a", "b")
    for task in "ab":
        alone, own_rows = fitted(task)
        assert [r["lr"] for r in rows[task]] == [r["lr"] for r in own_rows[task]]
        mine = {n: t for n, t in everything(together).items() if n.startswith(f"tasks.{task}.")}
        assert_same_bits(mine, {n: everything(alone)[n] for n in mine})
    assert [r["lr"] for r in rows["a"]] != [r["lr"] for r in rows["b"]]


def test_each_epoch_of_a_phase_is_announced_with_its_number() -> None:
    calls: list[tuple[str, tuple[str, ...], int, int, bool]] = []

    def announce(name: str):  # type: ignore[no-untyped-def]
        def call(model: MultiTaskModel, tasks: tuple[str, ...], epoch: int, epochs: int) -> None:
            assert isinstance(model, MultiTaskModel)
            calls.append((name, tasks, epoch, epochs, torch.is_grad_enabled()))

        return call

    base = dense_net()
    phases = (
        Phase("one", epochs=1, each_epoch=announce("one")),
        Phase("two", each_epoch=announce("two")),
    )
    model = model_of(base, replace(weft.full_finetune(base), phases=phases))
    data = {t: in_order(vectors(16, 3, i)) for i, t in enumerate("ab")}
    weft.fit(model, data, epochs=3, progress=False)
    assert calls == [
        ("one", ("a", "b"), 0, 1, False),
        ("two", ("a", "b"), 0, 2, False),
        ("two", ("a", "b"), 1, 2, False),
    ]


def test_a_task_with_final_gates_trains_on_as_one_phase() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base, penalty=1.0), tasks=["a"])
    data = {"a": in_order(images(24, 3, 1))}
    first = weft.fit(model, data, epochs=6, progress=False)
    assert [row["phase"] for row in first["a"]][-1] == "harden"
    owned = set(model.tasks["a"].own)
    second = weft.fit(model, data, epochs=2, progress=False)
    assert {row["phase"] for row in second["a"]} == {"train"}
    assert set(model.tasks["a"].own) == owned
