"""The results of sharing.py and dynashare.py as Markdown tables: mean ± deviation over seeds.

Run with: python bench/claims/sharing_tables.py [FOLDER]   (a folder with sharing/ and dynashare/)
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import weft

HERE = Path(__file__).parent
Result = dict[str, Any]
Seeds = list[Result]
Column = Callable[[Result], float]


def read(folder: Path, group: str) -> dict[str, dict[str, Seeds]]:
    """By group and cell, the results of all seeds."""
    found: dict[str, dict[str, Seeds]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result[group], {}).setdefault(result["cell"], []).append(result)
    return found


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, standard deviation between seeds, and the number of seeds if it is not three."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text if len(values) == 3 else f"{text} ({len(values)})"


def table(cells: Mapping[str, Seeds], order: list[str], columns: Mapping[str, Column]) -> str:
    """A row per cell in the given order, a column per figure; what is not there is left out."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for cell in order:
        if cell in cells:
            figures = [spread([column(r) for r in cells[cell]]) for column in columns.values()]
            lines.append(f"| {cell} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def score(task: str, metric: str, split: str = "test") -> Column:
    """One score of a task, times 100."""
    return lambda result: 100 * result["tasks"][task][split][metric]


def sharing_tables(folder: Path) -> None:
    """Print accuracy, ownership and compute of each run of sharing.py."""
    config = yaml.safe_load((HERE / "sharing.yaml").read_text())
    for run, cells in read(folder, "run").items():
        tasks = list(next(iter(cells.values()))[0]["tasks"])
        by_task = {t.removeprefix("pacs_"): score(t, "accuracy") for t in tasks}
        order = config["runs"][run]["cells"]
        print(f"\n**{run}: test accuracy in %, last epoch**\n")
        print(table(cells, order, {"mean": lambda r: 100 * r["mean_test"], **by_task}))
        print(f"\n**{run}: validation, what a task owns in %, and million multiply-adds**\n")
        columns: dict[str, Column] = {
            "validation": lambda r: 100 * r["mean_val"],
            "owned parameters": lambda r: 100 * r["own_fraction"],
            "owned convolutions": lambda r: 100 * r["own_convolutions"],
            "one task": lambda r: r["multiply_adds"]["one_task"] / 1e6,
            "all tasks on one input": lambda r: r["multiply_adds"]["all_tasks"] / 1e6,
            "seconds": lambda r: r["seconds"],
        }
        print(table(cells, order, columns))


def dynashare_tables(folder: Path) -> None:
    """Print scores, Delta_T, executed blocks and time of each data set of dynashare.py."""
    config = yaml.safe_load((HERE / "dynashare.yaml").read_text())
    order = list(config["cells"])
    for name, cells in read(folder, "data").items():
        wanted = config["data"][name]["reference"]
        seeds = {r["seed"] for results in cells.values() for r in results}
        for split in ("test", "val"):
            columns: dict[str, Column] = {
                f"{task} {metric}": score(task, metric, split)
                for task, metrics in wanted.items()
                for metric in metrics
            }
            alone = {r["seed"]: r for r in cells.get("single", [])}
            if seeds <= set(alone):
                columns["Delta_T to single"] = improvement(wanted, alone, split)
            print(f"\n**{name}: {split} scores times 100, last epoch; Delta_T in %**\n")
            print(table(cells, order, columns))
        print(f"\n**{name}: executed blocks in %, and cost in % of plain sharing**\n")
        print(table(cells, order, cost_columns(next(iter(cells.values()))[0])))


def improvement(
    wanted: Mapping[str, list[str]], single: Mapping[int, Result], split: str
) -> Column:
    """Delta_T of a result against the single tasks of the same seed."""

    def scores(result: Result) -> dict[str, dict[str, float]]:
        return {t: {m: result["tasks"][t][split][m] for m in ms} for t, ms in wanted.items()}

    return lambda r: weft.relative_improvement(scores(r), scores(single[r["seed"]]))


def cost_columns(example: Result) -> dict[str, Column]:
    """Executed blocks by policy and with gates, multiply-adds, times, and the seconds of a cell."""
    columns: dict[str, Column] = {
        f"{task}: policy": lambda r, t=task: 100 * r["executed_by_policy"][t]
        for task in example["tasks"]
    }
    columns |= {
        f"{task}: rows": lambda r, t=task: 100 * r["executed"][t] for task in example["tasks"]
    }
    last = len(example["speed"]) - 1
    columns["multiply-adds"] = lambda r: 100 * share_of_plain(r["speed"][last], "multiply_adds")
    for place, speed in enumerate(example["speed"]):
        what = f"time, {speed['rows']} row" + ("s" if speed["rows"] > 1 else "")
        columns[what] = lambda r, p=place: 100 * share_of_plain(r["speed"][p], "milliseconds")
    columns["seconds"] = lambda r: r["seconds"]
    return columns


def share_of_plain(speed: Mapping[str, Any], what: str) -> float:
    """The cost of all tasks together against that of plain sharing."""
    return sum(speed[what].values()) / sum(speed[f"plain_{what}"].values())


def main() -> None:
    """Print the tables of what is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    sharing_tables(folder / "sharing")
    dynashare_tables(folder / "dynashare")


if __name__ == "__main__":
    main()
