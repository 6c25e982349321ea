"""Budgets: the price moves until what is open fits, and the best set of layers stays."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.errors import PlanError
from weft.methods.budget import GRID, USED, Budget, ChooseWithin, DualAscent, best_within
from weft.methods.taps import PRICE
from weft.training import Epoch

# ------------------------------------------------------------------------ the final set


def by_trying_all(values: list[float], costs: list[int], most: int) -> float | None:
    """The largest value of all sets whose cost is between USED * most and most."""
    found = None
    for size in range(len(values) + 1):
        for chosen in itertools.combinations(range(len(values)), size):
            cost = sum(costs[i] for i in chosen)
            if USED * most <= cost <= most:
                value = sum(values[i] for i in chosen)
                found = value if found is None else max(found, value)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_final_set_is_the_best_of_all_sets(seed: int) -> None:
    """With a bound of as many as there are grid steps, no cost is rounded."""
    draw = random.Random(seed)
    costs = [draw.choice([1, 10, 100, 500, 1000, 3000]) + draw.randint(0, 300) for _ in range(10)]
    values = [draw.uniform(-1.0, 0.5) for _ in costs]
    chosen = best_within(values, costs, GRID)
    assert sum(costs[i] for i in chosen) <= GRID
    best = by_trying_all(values, costs, GRID)
    if best is None:
        assert sum(costs[i] for i in chosen) < USED * GRID
    else:
        assert sum(values[i] for i in chosen) == pytest.approx(best)


@pytest.mark.parametrize("most", [7, 1000, 123_457])
def test_rounded_costs_never_exceed_the_bound(most: int) -> None:
    draw = random.Random(most)
    for _ in range(20):
        costs = [draw.randint(0, most) for _ in range(8)]
        chosen = best_within([draw.random() for _ in costs], costs, most)
        assert sum(costs[i] for i in chosen) <= most


def test_where_no_set_uses_the_budget_the_nearest_from_below_is_taken() -> None:
    assert best_within([1.0, 1.0], [10, 50], 45) == {0}
    assert best_within([-1.0, 5.0], [30, 100], 45) == {0}
    assert best_within([1.0, 1.0], [50, 60], 45) == set()
    assert best_within([], [], 10) == set()


def test_layers_that_cost_nothing_are_taken_by_their_value() -> None:
    assert best_within([1.0, -1.0, 0.5], [0, 0, 10], 10) == {0, 2}


# -------------------------------------------------------------------------- the price


def _own(scores: list[float], price: float) -> dict[str, torch.Tensor]:
    own = {f"{i}:score": torch.tensor(s) for i, s in enumerate(scores)}
    return {**own, PRICE: torch.tensor(price, dtype=torch.float64)}


def _budget(most: int) -> Budget:
    return Budget(("0:score", "1:score"), (30, 10), 5, most, 0.1, PRICE)


@pytest.mark.parametrize(
    ("scores", "most", "exponent"),
    [
        ([0.2, 0.2], 30, 0.5),  # 45 of 30 are open: half too much
        ([0.2, 0.2], 15, 1.0),  # three times too much counts as twice
        ([0.2, 0.0], 35, 0.0),
        ([0.0, 0.1], 30, -0.5),  # at the threshold is open
    ],
)
def test_the_price_follows_the_excess(scores: list[float], most: int, exponent: float) -> None:
    own = {"a": _own(scores, 2.0), "b": _own([0.0, 0.0], 1.0)}
    DualAscent(_budget(most))(None, own, {})  # type: ignore[arg-type]
    assert float(own["a"][PRICE]) == pytest.approx(2.0 * math.exp(0.05 * exponent))
    assert float(own["b"][PRICE]) == pytest.approx(math.exp(0.05 * (5 - most) / most))


# ---------------------------------------------------------------------------- in a plan


def net() -> nn.Sequential:
    """Layers of very different sizes: 10 %, 84 % and 4 % of the parameters, norms 2 %."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1, bias=False),
    )


def batches() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 3, 6, 6, generator=generator)
    y = torch.randint(3, (48,), generator=generator)
    x[:, 0] += y[:, None, None]
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 0.9, 1.0])
def test_a_task_ends_at_or_under_its_budget(budget: float) -> None:
    base = net()
    model = weft.MultiTaskModel(
        base, weft.taps(base, budget=budget), example=torch.zeros(1, 3, 6, 6)
    )
    model.add_task("a", weft.Classification(3))
    history = weft.fit(model, {"a": batches()}, epochs=8, lr=0.05, progress=False)
    assert model.ledger("a").own_fraction <= budget
    assert PRICE not in model.tasks["a"].own
    prices = [row["price"] for row in history["a"]]
    assert prices[:3] == pytest.approx([0.3] * 3)
    assert all(price > 0 for price in prices)


def test_a_run_that_stops_early_ends_within_its_budget() -> None:
    """Stopped by another task or a callback before the scores freeze."""
    base = net()
    plan = weft.taps(base, budget=0.2, warmup=0, harden=0.2)
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, 6, 6))
    model.add_task("a", weft.Classification(3))
    data = batches()

    def stop(epoch: Epoch) -> None:
        assert model.ledger("a").own_fraction > 0.2
        epoch.stop()

    weft.fit(model, {"a": (data, data)}, epochs=8, callbacks=[stop], progress=False)
    assert 0 < model.ledger("a").own_fraction <= 0.2
    # What is reported was measured with the gates that stayed.
    assert model.tasks["a"].facts["metrics"]["val"] == weft.evaluate(model, {"a": data})["a"]


def test_a_budget_in_bytes_counts_running_statistics() -> None:
    base = net()
    norms = 4 * 4 * (8 + 24) + 2 * 8  # four vectors of each, and two counters of 8 bytes
    model = weft.MultiTaskModel(
        base, weft.taps(base, budget=norms + 4 * 100), example=torch.zeros(1, 3, 6, 6)
    )
    model.add_task("a", weft.Classification(3))
    weft.fit(model, {"a": batches()}, epochs=6, progress=False)
    ledger = model.ledger("a")
    assert ledger.own_bytes == norms + 4 * 96  # the 1x1 convolution fits, the others do not
    with pytest.raises(PlanError, match=f"takes {norms:,}"):
        weft.taps(base, budget=norms - 1)


def test_tasks_have_prices_of_their_own() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.taps(base, budget=0.2), example=torch.zeros(1, 3, 6, 6))
    for name in "ab":
        model.add_task(name, weft.Classification(3))
    own = model.tasks["a"].own
    for key in list(own):
        if key.endswith(":score"):
            with torch.no_grad():
                own[key].fill_(0.0)
    plan = model.sharing
    select = next(p for p in plan.phases if p.name == "select")
    assert select.transition is not None
    with torch.no_grad():
        select.transition(model, {t: dict(model.tasks[t].own) for t in "ab"}, {})
    assert float(model.tasks["a"].own[PRICE]) < 0.3 < float(model.tasks["b"].own[PRICE])


def test_the_penalty_is_the_price_times_the_share_of_parameters() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.taps(base, budget=0.2, penalty=2.0))
    model.add_task("a", weft.Task(head=None, loss=nn.functional.mse_loss))
    sizes = torch.tensor([216.0, 1728.0, 96.0])
    scores = torch.tensor([0.1, -0.4, 0.3])
    own = model.tasks["a"].own
    with torch.no_grad():
        for key, score in zip(("0:score", "3:score", "6:score"), scores, strict=True):
            own[key].copy_(score)
    expected = 2.0 * float((sizes / sizes.sum() * scores.abs()).sum())
    assert float(model.penalty("a").detach()) == pytest.approx(expected)
    by_layer = weft.MultiTaskModel(base, weft.taps(base, penalty=2.0, charge="parameters"))
    by_layer.add_task("a", weft.Task(head=None, loss=nn.functional.mse_loss))
    expected = 2.0 * 0.15
    assert float(by_layer.penalty("a").detach()) == pytest.approx(expected)


def test_choosing_moves_only_scores_that_must_change_sides() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.taps(base, budget=0.2), example=torch.zeros(1, 3, 6, 6))
    model.add_task("a", weft.Classification(3))
    own = model.tasks["a"].own
    scores = {"0:score": -0.3, "3:score": 0.4, "6:score": 0.2}
    with torch.no_grad():
        for key, value in scores.items():
            own[key].fill_(value)
    harden = model.sharing.phases[-1]
    assert isinstance(harden.prepare, ChooseWithin)
    harden.prepare(model, {"a": ()})
    after = {key: float(own[key].detach()) for key in scores}
    assert after["3:score"] == pytest.approx(0.095)
    assert after["3:score"] < 0.1 <= after["0:score"]
    assert after["6:score"] == pytest.approx(0.2)
    assert model.ledger("a").open_gates == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_choice_holds_in_every_precision(dtype: torch.dtype) -> None:
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).to(dtype)
    model = weft.MultiTaskModel(base, weft.taps(base, budget=0.5))
    model.add_task("a", weft.Task(head=None, loss=nn.functional.mse_loss))
    harden = model.sharing.phases[-1]
    assert harden.prepare is not None
    harden.prepare(model, {"a": ()})
    assert model.ledger("a").open_gates == (3, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.2, "charge": "layers"}, "charge='parameters'"),
        ({"budget": 0.0}, "is a share"),
        ({"budget": 1.5}, "is a share"),
        ({"budget": -3}, "is a share"),
        ({"budget": True}, "is a share"),
        ({"budget": 0.2, "harden": 0.0}, "harden and penalty must not be 0"),
        ({"budget": 0.2, "penalty": 0.0}, "harden and penalty must not be 0"),
        ({"budget": 0.001}, "normalisation alone"),
        ({"charge": "bytes"}, "'layers' or 'parameters'"),
        ({"charge": "parameters", "legacy_norm": 52}, "goes with charge='layers'"),
        ({"joint": True, "form": "tuned"}, "only form='residual' works"),
    ],
)
def test_wrong_budgets_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        weft.taps(net(), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- full joint


def test_full_joint_trains_the_base_and_every_tasks_residuals() -> None:
    base = net()
    plan = weft.taps(base, joint=True, warmup=0)
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, 6, 6))
    for name in "ab":
        model.add_task(name, weft.Classification(3))
    assert set(model.shared_trainable()) == {"0.weight", "3.weight", "6.weight"}
    x, y = next(iter(batches()))
    step = model.step({"a": x, "b": x})
    loss = sum(nn.functional.cross_entropy(o, y) for o in step.outputs.values())
    shared = model.shared_trainable()["0.weight"]
    residuals = [model.tasks[t].own["0.weight:residual"] for t in "ab"]
    found = torch.autograd.grad(loss, [shared, *residuals])  # type: ignore[arg-type]
    # E = W + D_t, so the gradient of W is the sum of those of the residuals.
    torch.testing.assert_close(found[0], found[1] + found[2])
    weft.fit(model, {t: batches() for t in "ab"}, epochs=3, lr=0.05, progress=False)
    assert not torch.equal(model.base[0].weight, base[0].weight)
    assert torch.equal(base[0].weight, net()[0].weight)
