"""Budgets of TAPS against fixed penalties of the same size, and along a path, as Markdown tables.

A fixed penalty seldom lands on a budget, so its accuracy at the size that the budget ended with is
read off the line between the two nearest penalties (means over seeds, in the logarithm of the
size); outside of their range the nearest one stands. Run with:
python bench/claims/budget_tables.py [FOLDER]   (a folder with vision/, budgets/ and path/)
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import yaml
from table import HERE, Results, read, spread

BUDGETS = ("0.05", "0.1", "0.2", "0.4")
FIXED = ("taps_3", "taps_1", "taps_0.3", "taps_0.1")
FIXED_HERE = ("fixed_6", "fixed_3", "fixed_2", "fixed_1", "fixed_0.3", "fixed_0.1")
Point = tuple[float, float]


def points(results: Results, cells: tuple[str, ...], task: str) -> list[Point]:
    """Mean size and accuracy in % of each fixed penalty."""
    found = [results[cell, task] for cell in cells if results.get((cell, task))]
    return [
        (
            statistics.mean(100 * r["own_fraction"] for r in rows),
            statistics.mean(100 * r["test"]["accuracy"] for r in rows),
        )
        for rows in found
    ]


def at(size: float, line: list[Point]) -> float:
    """The accuracy of fixed penalties at a size."""
    if size <= line[0][0]:
        return line[0][1]
    for (a, low), (b, high) in pairwise(line):
        if a <= size <= b:
            share = math.log(size / a) / math.log(b / a) if b > a else 1.0
            return low + share * (high - low)
    return line[-1][1]


def budget_table(budgets: Results, fixed: Results, tasks: list[str]) -> str:
    """A row per data set and budget."""
    lines = ["| | budget | owned, % | test accuracy | fixed penalty, same size | difference |"]
    lines.append("|---" * 6 + "|")
    gaps: dict[str, list[float]] = {}
    for task in tasks:
        line = sorted(points(fixed, FIXED, task) + points(budgets, FIXED_HERE, task))
        for budget in BUDGETS:
            rows = budgets.get((f"budget_{budget}", task), [])
            if not rows or not line:
                continue
            sizes = [100 * r["own_fraction"] for r in rows]
            scores = [100 * r["test"]["accuracy"] for r in rows]
            expected = at(statistics.mean(sizes), line)
            gap = statistics.mean(scores) - expected
            gaps.setdefault(budget, []).append(gap)
            lines.append(
                f"| {task.removeprefix('pacs_')} | {100 * float(budget):.0f} % | {min(sizes):.1f} "
                f"to {max(sizes):.1f} | {spread(scores)} | {expected:.1f} | {gap:+.1f} |"
            )
    for budget, found in gaps.items():
        mean = statistics.mean(found)
        lines.append(f"| mean of {len(found)} | {100 * float(budget):.0f} % | | | | {mean:+.1f} |")
    return "\n".join(lines)


def path_table(budgets: Results, folder: Path) -> str:
    """Accuracy along the path and of trainings of their own."""
    lines = ["| | budget | own training | along the path |", "|---|---|---|---|"]
    found: dict[str, list[dict[str, dict[str, dict[str, float]]]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["task"], []).append(result["points"])
    for task, seeds in found.items():
        for budget in BUDGETS:
            rows = budgets.get((f"budget_{budget}", task), [])
            apart = spread([100 * r["test"]["accuracy"] for r in rows]) if rows else "-"
            along = spread([100 * p[budget]["test"]["accuracy"] for p in seeds])
            name = task.removeprefix("pacs_")
            lines.append(f"| {name} | {100 * float(budget):.0f} % | {apart} | {along} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables of what is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    budgets, fixed = read(folder / "budgets"), read(folder / "vision")
    tasks = list(yaml.safe_load((HERE / "budgets.yaml").read_text())["tasks"])
    print(f"\n**Budgets: test accuracy in %**\n\n{budget_table(budgets, fixed, tasks)}")
    print(f"\n**A path of budgets: test accuracy in %**\n\n{path_table(budgets, folder / 'path')}")


if __name__ == "__main__":
    main()
