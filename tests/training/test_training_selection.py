"""Which epoch is kept, chosen on validation, and when training stops early."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
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
from weft.core.task import Task
from weft.errors import ConfigError
from weft.training import Epoch


class Scripted:
    """A metric of one's own, without torchmetrics, that reads its values from a list.

    Copies share the list: what is under test is which epoch they make the best.
    """

    def __init__(self, values: list[float], higher_is_better: bool = True) -> None:
        self.values = iter(values)
        self.higher_is_better = higher_is_better

    def __deepcopy__(self, _: Any) -> Scripted:
        return self

    def update(self, output: Tensor, target: Tensor) -> None:
        pass

    def compute(self) -> float:
        return next(self.values)

    def reset(self) -> None:
        pass


def _task(values: list[float], higher_is_better: bool = True) -> Task:
    return Task(
        head=torch.nn.Linear(8, 3),
        loss=torch.nn.functional.cross_entropy,
        metric={"script": Scripted(values, higher_is_better)},
    )


def _fit(scripts: dict[str, Task], plan: Any = weft.full_finetune, **options: Any) -> Any:
    base = dense_net()
    model = weft.MultiTaskModel(base, plan(base))
    data = {}
    states: list[dict[str, Tensor]] = []
    for index, (name, task) in enumerate(scripts.items()):
        torch.manual_seed(index)
        model.add_task(name, task)
        batches = in_order(vectors(16, 3, index))
        data[name] = (batches, batches)
    options = {"epochs": 4, "lr": 0.05, "progress": False, **options}
    keep = [lambda epoch: states.append(everything(epoch.model))]
    history = weft.fit(model, data, callbacks=keep, **options)
    return model, history, states


@pytest.mark.parametrize(
    ("values", "higher", "best"),
    [
        ([0.1, 0.9, 0.5, 0.2], True, 1),
        ([0.1, 0.9, 0.5, 0.2], False, 0),
        ([0.5, 0.9, 0.9, 0.2], True, 2),
        ([math.nan, 0.2, 0.1, math.nan], True, 1),
        ([math.nan, math.nan, math.nan, math.nan], True, 3),
        ([math.nan, 0.2, 0.3, 0.4], False, 1),
    ],
)
def test_the_best_epoch_is_put_back(values: list[float], higher: bool, best: int) -> None:
    model, history, states = _fit({"a": _task(values, higher)})
    assert history.best == {"a": best}
    assert_same_bits(everything(model), states[best])
    assert history.epochs == 4
    assert len(history["a"]) == 4
    facts = model.tasks["a"].facts
    assert facts["history"] == history["a"]
    assert facts["metrics"]["val"] == history["a"][best]["val"]


def test_the_last_epoch_is_kept_when_asked_for() -> None:
    model, history, states = _fit({"a": _task([0.9, 0.1, 0.1, 0.1])}, keep="last")
    assert history.best == {"a": 3}
    assert_same_bits(everything(model), states[3])
    assert model.tasks["a"].facts["metrics"]["val"]["script"] == 0.1


def test_tasks_apart_keep_epochs_of_their_own() -> None:
    scripts = {"a": _task([0.9, 0.1, 0.1, 0.1]), "b": _task([0.1, 0.1, 0.9, 0.1])}
    model, history, states = _fit(scripts)
    assert history.best == {"a": 0, "b": 2}
    for task, epoch in history.best.items():
        mine = {n: t for n, t in everything(model).items() if n.startswith(f"tasks.{task}.")}
        assert_same_bits(mine, {n: states[epoch][n] for n in mine})


def test_tasks_that_train_shared_tensors_keep_the_best_mean_together() -> None:
    scripts = {"a": _task([0.9, 0.1, 0.1, 0.1]), "b": _task([0.1, 0.1, 0.95, 0.1])}
    model, history, states = _fit(scripts, plan=weft.hard_sharing)
    assert history.best == {"a": 2, "b": 2}
    assert_same_bits(everything(model), states[2])


def test_where_metrics_differ_the_weighted_losses_choose() -> None:
    """Accuracies and angles have no mean that would not depend on their units."""
    weights = {"a": 0.5, "b": 3.0}
    for unit in (1.0, 1000.0):
        angles = [unit * value for value in (20.0, -18.0, 0.0, 18.0, 1.0, 2.0)]
        scripts = {"a": _task([0.9] + [0.6] * 5), "b": _task(angles, higher_is_better=False)}
        _, history, _ = _fit(scripts, plan=weft.hard_sharing, epochs=6, lr=0.4, weights=weights)
        losses = [
            sum(weights[t] * history[t][epoch]["val"]["loss"] for t in "ab") for epoch in range(6)
        ]
        least = min(range(6), key=losses.__getitem__)
        assert history.best == {"a": least, "b": least}


def test_a_task_without_validation_keeps_the_last() -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    batches = in_order(vectors(16, 3, 1))
    history = weft.fit(
        model, {"a": batches, "b": (batches, batches)}, epochs=3, lr=1e-4, progress=False
    )
    assert history.best["a"] == 2
    assert history["a"][0]["val"] == {}
    assert model.tasks["a"].facts["metrics"] == {"val": {}}
    assert set(history["b"][0]["val"]) == {"accuracy", "loss"}


def test_patience_stops_after_epochs_without_a_better_score() -> None:
    script = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.9, 0.9]
    model, history, states = _fit({"a": _task(script)}, epochs=8, patience=3)
    assert history.epochs == 5
    assert history.best == {"a": 1}
    assert_same_bits(everything(model), states[1])


def test_patience_waits_for_the_last_task() -> None:
    scripts = {"a": _task([0.9] + [0.1] * 7), "b": _task([0.1, 0.2, 0.3, 0.4, 0.1, 0.1, 0.1, 0.1])}
    _, history, _ = _fit(scripts, epochs=8, patience=2)
    assert history.epochs == 6


def test_patience_does_not_count_epochs_that_may_not_be_kept() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base, warmup=3, harden=0.3), tasks=["a"])
    model.add_task("b", weft.Classification(3), sharing=weft.linear_probe(base))
    train, val = in_order(images(16, 3, 1)), in_order(images(16, 3, 2))
    history = weft.fit(
        model, dict.fromkeys("ab", (train, val)), epochs=8, lr=1e-9, patience=1, progress=False
    )
    assert history["a"][-1]["phase"] == "harden"


def test_patience_without_validation_is_refused() -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    with pytest.raises(ConfigError, match="patience needs validation"):
        weft.fit(model, {"a": in_order(vectors(16, 3, 1))}, patience=2, progress=False)


def test_a_callback_stops_training_after_its_epoch() -> None:
    base = dense_net()
    model = model_of(base, weft.full_finetune(base))
    numbers: list[int] = []

    def stop(epoch: Epoch) -> None:
        numbers.append(epoch.number)
        assert epoch.model is model
        assert epoch.rows["a"]["epoch"] == epoch.number
        if epoch.number == 1:
            epoch.stop()

    history = weft.fit(
        model, {"a": in_order(vectors(16, 3, 1))}, epochs=5, callbacks=[stop], progress=False
    )
    assert numbers == [0, 1]
    assert history.epochs == 2
    assert history.best == {"a": 1}
