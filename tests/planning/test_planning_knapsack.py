"""The exact solver against brute force, over random small cases."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from weft.errors import PlanError
from weft.planning.knapsack import Item, Objective, least_bytes, solve


def covers(items: Sequence[Item], chosen: Sequence[int], tasks: list[str]) -> bool:
    return sorted(t for i in chosen for t in items[i].values) == tasks


def rank(
    items: Sequence[Item], chosen: Sequence[int], objective: Objective, weights: dict[str, float]
) -> tuple[float, ...]:
    """What is maximised, first to last; rounded, as sums of floats depend on their order."""
    values = {t: v for i in chosen for t, v in items[i].values.items()}
    mean = round(sum(weights.get(t, 1.0) * v for t, v in values.items()), 9)
    size = sum(items[i].bytes for i in chosen)
    worst = min(values.values())
    return (worst, mean, -size) if objective == "worst" else (mean, -size)


def brute_force(
    items: Sequence[Item],
    tasks: list[str],
    budget: float,
    objective: Objective,
    weights: dict[str, float],
) -> tuple[float, ...] | None:
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(items)), size) for size in range(1, len(tasks) + 1)
    )
    ranks = [
        rank(items, chosen, objective, weights)
        for chosen in subsets
        if covers(items, chosen, tasks) and sum(items[i].bytes for i in chosen) <= budget
    ]
    return max(ranks, default=None)


def random_items(draw: random.Random, tasks: list[str]) -> list[Item]:
    """A few items for each task, and some for groups of them; values repeat, so that ties occur."""
    levels = [round(draw.random(), draw.choice([1, 2, 9])) for _ in range(6)]
    largest = draw.choice([10, 10**4, 10**9])

    def item(covered: list[str]) -> Item:
        values = {t: draw.choice(levels) - draw.choice([0.0, 1.0]) for t in covered}
        return Item(values, draw.choice([0, draw.randrange(largest), draw.randrange(largest)]))

    single = [item([task]) for task in tasks for _ in range(draw.randrange(1, 4))]
    groups = [draw.sample(tasks, draw.randrange(2, len(tasks) + 1)) for _ in range(3)]
    items = [*single, *(item(group) for group in groups if len(tasks) > 1)]
    draw.shuffle(items)
    return items


@pytest.mark.parametrize("objective", ["mean", "worst"])
@pytest.mark.parametrize("seed", range(60))
def test_the_solver_equals_brute_force(seed: int, objective: Objective) -> None:
    draw = random.Random(seed)
    tasks = [f"t{i}" for i in range(draw.randrange(2, 5))]
    items = random_items(draw, tasks)
    weights = {} if objective == "worst" or seed % 2 else {t: draw.random() * 3 for t in tasks}
    sizes = sorted({sum(draw.choice(items).bytes for _ in tasks) for _ in range(4)})
    least = least_bytes(items)
    for budget in [0, least - 1, least, *sizes, math.inf]:
        chosen = solve(items, budget, objective, weights)
        expected = brute_force(items, tasks, budget, objective, weights)
        if expected is None:
            assert chosen is None
            assert budget < least
        else:
            assert chosen is not None
            assert covers(items, chosen, tasks)
            found = rank(items, chosen, objective, weights)
            assert found == pytest.approx(expected, abs=1e-9)
            assert sum(items[i].bytes for i in chosen) == -expected[-1]


def test_one_byte_decides() -> None:
    large = 3_000_000_000
    items = [Item({"a": 0.5}, 0), Item({"a": 0.6}, large), Item({"b": 0.1}, large - 1)]
    assert solve(items, 2 * large - 1) == [1, 2]
    assert solve(items, 2 * large - 2) == [0, 2]


@pytest.mark.parametrize("outlier", [1e6, 1e8, 1e10, 1e300])
@pytest.mark.parametrize("gap", [0.1, 1e-3, 1e-6])
def test_a_candidate_that_diverged_hides_no_difference(outlier: float, gap: float) -> None:
    """The outlier is the smallest item of its task, so it is not simply dominated."""
    items = [Item({t: -0.5 - extra}, size) for t in "ab" for extra, size in ((0, 500), (gap, 10))]
    items += [Item({"a": -outlier}, 0), Item({"a": -outlier, "b": -0.5}, 1)]
    assert solve(items, 1000) == [0, 2]
    assert solve(items, 510) in ([0, 3], [1, 2])
    assert solve(items, 500 - 1) == [1, 3]
    assert solve(items, 5) == [5]


def test_a_joint_item_is_charged_once_and_covers_its_group_whole() -> None:
    items = [
        Item({"a": 0.9, "b": 0.2}, 100),
        Item({"a": 0.5}, 60),
        Item({"b": 0.5}, 60),
        Item({"a": 0.1}, 0),
    ]
    assert solve(items, 110) == [0]
    assert solve(items, 120) == [0]  # 1.1 in all against 1.0
    assert solve(items, 120, "worst") == [1, 2]
    assert solve(items, 90) == [2, 3]
    assert solve(items, 59) is None


def test_items_that_cannot_cover_every_task_are_refused() -> None:
    items = [Item({"a": 1.0, "b": 1.0}, 1), Item({"b": 1.0, "c": 1.0}, 1)]
    with pytest.raises(PlanError, match="cannot cover every task exactly once"):
        least_bytes(items)


def test_many_tasks_are_solved_exactly_too() -> None:
    draw = random.Random(0)
    items = [
        Item({f"t{task}": draw.random()}, draw.randrange(10**6))
        for task in range(100)
        for _ in range(12)
    ]
    budget = 20_000_000
    chosen = solve(items, budget)
    assert chosen is not None
    assert len(chosen) == 100
    assert sum(items[i].bytes for i in chosen) <= budget
    # No better than its relaxation, which divides bytes by a price.
    price = 1e-7
    bound = price * budget + sum(
        max(i.values[f"t{task}"] - price * i.bytes for i in items if f"t{task}" in i.values)
        for task in range(100)
    )
    assert sum(sum(items[i].values.values()) for i in chosen) <= bound + 1e-9
