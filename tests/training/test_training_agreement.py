"""What fit does, done in other ways: by hand, alone, in bigger batches, in the other form."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training_nets import (
    assert_close,
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
from weft.core.sharing import Sharing
from weft.training.optimization import PullToBase, make_optimizer, parameter_groups

Plan = Callable[[nn.Module], Sharing]

SINGLE_PHASE: dict[str, Plan] = {
    "linear_probe": weft.linear_probe,
    "scale_bias": weft.scale_bias,
    "full_finetune": weft.full_finetune,
    "taps": lambda base: weft.taps(base, warmup=0, harden=0.0),
    "taps_residual": lambda base: weft.taps(base, warmup=0, harden=0.0, form="residual"),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SINGLE_PHASE)
def test_a_loop_of_ones_own_gives_the_same(name: str, optimizer: str) -> None:
    batches = in_order(images(32, 3, 1))
    fitted, own = (model_of(b, SINGLE_PHASE[name](b)) for b in (conv_net(), conv_net()))
    options = {"lr": 0.05, "head_lr": 0.02, "weight_decay": 0.01}
    weft.fit(
        fitted,
        {"a": batches},
        epochs=3,
        schedule="constant",
        optimizer=optimizer,  # type: ignore[arg-type]
        progress=False,
        **options,  # type: ignore[arg-type]
    )

    groups = parameter_groups(own, ["a"], **options)  # type: ignore[arg-type]
    chosen = make_optimizer(optimizer, groups, momentum=0.9)  # type: ignore[arg-type]
    pull = PullToBase(own, ["a"], chosen, 0.01)
    own.train()
    for _ in range(3):
        for x, y in batches:
            loss = nn.functional.cross_entropy(own(x, task="a"), y) + own.penalty("a")
            chosen.zero_grad()
            loss.backward()
            pull()
            chosen.step()
    own.harden("a")
    assert_same_bits(everything(fitted), everything(own))


def test_a_plain_loop_over_task_parameters_gives_the_same() -> None:
    batches = in_order(images(32, 3, 1))
    fitted, own = (model_of(b, weft.full_finetune(b)) for b in (conv_net(), conv_net()))
    weft.fit(fitted, {"a": batches}, epochs=2, lr=0.05, schedule="constant", progress=False)
    chosen = torch.optim.SGD(own.task_parameters("a"), lr=0.05, momentum=0.9)
    own.train()
    for _ in range(2):
        for x, y in batches:
            chosen.zero_grad()
            (nn.functional.cross_entropy(own(x, task="a"), y) + own.penalty("a")).backward()
            chosen.step()
    assert_same_bits(everything(fitted), everything(own))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("plan", [weft.full_finetune, weft.taps, weft.scale_bias])
def test_tasks_that_share_nothing_train_together_as_alone(plan: Plan, optimizer: str) -> None:
    data = {
        "a": (shuffled(images(32, 3, 1)), shuffled(images(16, 3, 3))),
        "b": (shuffled(images(32, 3, 2)), shuffled(images(16, 3, 4))),
    }
    options = {"epochs": 6, "lr": 0.05, "weight_decay": 0.01, "accumulate": 3}
    options |= {"optimizer": optimizer, "progress": False}
    base = conv_net()
    joint = model_of(base, plan(base))
    together = weft.fit(joint, data, **options)  # type: ignore[arg-type]
    base = conv_net()
    alone = model_of(base, plan(base))
    for task in ("b", "a"):
        history = weft.fit(alone, {task: data[task]}, **options)  # type: ignore[arg-type]
        assert history.best[task] == together.best[task]
        assert [r["val"] for r in history[task]] == [r["val"] for r in together[task]]
        assert [r["loss"] for r in history[task]] == [r["loss"] for r in together[task]]
    assert_same_bits(everything(joint), everything(alone))


def test_augmentation_of_a_task_does_not_depend_on_the_others() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            noise = torch.randn(()) + np.random.randn() + random.gauss(0.0, 1.0)
            return x + noise, y

    data = {t: shuffled(Noisy(*vectors(24 + 8 * i, 3, i).tensors)) for i, t in enumerate("ab")}
    base = dense_net()
    joint, alone = (model_of(base, weft.full_finetune(base)) for _ in range(2))
    weft.fit(joint, data, epochs=2, steps=5, progress=False)
    for task in "ab":
        weft.fit(alone, {task: data[task]}, epochs=2, steps=5, progress=False)
    assert_same_bits(everything(joint), everything(alone))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_larger_batch(accumulate: int) -> None:
    data = vectors(40, 3, 1, torch.float64)
    small = in_order(data, 4)
    steps = [small[i : i + accumulate] for i in range(0, len(small), accumulate)]
    large = [tuple(torch.cat(part) for part in zip(*step, strict=True)) for step in steps]
    results = []
    for batches, count in ((small, accumulate), (large, 1)):
        base = dense_net().double()
        model = model_of(base, weft.full_finetune(base))
        weft.fit(
            model,
            {"a": batches},
            epochs=2,
            lr=0.1,
            accumulate=count,
            clip=0.5,
            warmup_steps=3,
            progress=False,
        )
        results.append(everything(model))
    assert_close(results[0], results[1], 1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_tuned_form_of_taps_is_the_residual_form(optimizer: str) -> None:
    """With weight decay, a schedule, clipping, frozen scores, and gates that close."""
    batches = in_order(images(32, 3, 1, torch.float64))
    lr, penalty = {"sgd": (0.1, 0.08), "adamw": (0.01, 0.05)}[optimizer]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    results, ledgers = [], []
    for form in ("tuned", "residual"):
        base = conv_net().double()
        plan = weft.taps(base, warmup=1, harden=0.4, penalty=penalty, form=form)  # type: ignore[arg-type]
        model = model_of(base, plan, tasks=["a"])
        weft.fit(
            model,
            {"a": batches},
            epochs=6,
            lr=lr,
            weight_decay=0.1,
            clip=1.0,
            warmup_steps=4,
            optimizer=optimizer,  # type: ignore[arg-type]
            progress=False,
        )
        model.eval()
        results.append({**everything(model), "output": model(x, task="a").detach()})
        ledgers.append(model.ledger("a"))
    assert_close(results[0], results[1], 1e-9)
    assert [r.shared for r in ledgers[0].rows] == [r.shared for r in ledgers[1].rows]
    opened, gates = ledgers[0].open_gates
    assert 0 < opened < gates


def test_the_pull_to_the_base_uses_the_rate_of_each_group() -> None:
    base = dense_net().double()
    model = model_of(base, weft.taps(base, warmup=0, harden=0.0))
    own = model.trainable("a")
    first, second = own["0.weight:tuned"], own["3.weight:tuned"]
    start = {}
    with torch.no_grad():
        for name, p in (("0.weight", first), ("3.weight", second)):
            p.add_(1.0)
            start[name] = p.clone()
            p.grad = torch.zeros_like(p)
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    pull = PullToBase(model, ["a"], optimizer, 0.5)
    pull()
    optimizer.step()
    torch.testing.assert_close(first - base[0].weight, torch.full_like(first, 1 - 0.1 * 0.5))
    torch.testing.assert_close(second - base[3].weight, torch.full_like(second, 1 - 0.01 * 0.5))
    first.grad = None
    before = first.detach().clone()
    pull()
    optimizer.step()  # what has no gradient is frozen: decay leaves it alone, too
    assert torch.equal(first, before)


def test_two_passes_over_a_shorter_loader_make_one_over_the_longer() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    class Counting(list[list[Tensor]]):
        def __init__(self, task: str, batches: list[list[Tensor]]) -> None:
            super().__init__(batches)
            self.task = task

        def __iter__(self):  # type: ignore[no-untyped-def]
            for index, batch in enumerate(super().__iter__()):
                seen[self.task].append(index)
                yield batch

    base = dense_net()
    model = model_of(base, weft.linear_probe(base))
    data = {
        "a": Counting("a", in_order(vectors(40, 3, 1))),
        "b": Counting("b", in_order(vectors(16, 3, 1))),
    }
    history = weft.fit(model, data, epochs=2, progress=False)
    assert seen == {"a": [0, 1, 2, 3, 4] * 2, "b": [0, 1, 0, 1, 0] * 2}
    assert history.epochs == 2


def test_weights_scale_losses_and_leave_the_others_alone() -> None:
    def train(weights: dict[str, float], lr: float) -> dict[str, Tensor]:
        base = dense_net().double()
        model = model_of(base, weft.full_finetune(base))
        data = {t: in_order(vectors(16, 3, i, torch.float64)) for i, t in enumerate("ab")}
        weft.fit(model, data, epochs=2, lr=lr, momentum=0.0, weights=weights, progress=False)
        return everything(model)

    plain, weighted, double = train({}, 0.1), train({"a": 2.0}, 0.1), train({}, 0.2)
    for name in plain:
        expected = double if name.startswith("tasks.a.") else plain
        torch.testing.assert_close(weighted[name], expected[name], rtol=1e-12, atol=1e-12)


def test_joint_training_of_shared_tensors_sums_the_gradients() -> None:
    base = dense_net().double()
    model = model_of(base, weft.hard_sharing(base, own="top", fraction=0.4))
    by_hand = model_of(dense_net().double(), weft.hard_sharing(base, own="top", fraction=0.4))
    data = {t: in_order(vectors(16, 3, i, torch.float64)) for i, t in enumerate("ab")}
    weft.fit(model, data, epochs=1, lr=0.1, schedule="constant", progress=False)
    parameters = [p for t in "ab" for p in by_hand.task_parameters(t)]
    optimizer = torch.optim.SGD([*parameters, *by_hand.shared_trainable().values()], 0.1, 0.9)
    by_hand.train()
    for step in zip(*data.values(), strict=True):
        optimizer.zero_grad()
        for task, (x, y) in zip("ab", step, strict=True):
            nn.functional.cross_entropy(by_hand(x, task=task), y).backward()
        optimizer.step()
    assert_close(everything(model), everything(by_hand), 1e-12)
