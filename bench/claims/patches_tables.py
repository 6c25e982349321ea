"""The results of patches.py and joint.py as Markdown tables: mean ± deviation over seeds.

Run with: python bench/claims/patches_tables.py [FOLDER]
(a folder with patches/, joint/ and vision/; cells of vision.py stand in rows of their own)
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from sharing_tables import Column, Seeds, read, table

HERE = Path(__file__).parent
Result = dict[str, Any]


def of_vision(folder: Path, cells: dict[str, str], task: str) -> dict[str, Seeds]:
    """Results of vision.py for one data set, under other names."""
    found: dict[str, Seeds] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if result["task"] == task and result["cell"] in cells:
            found.setdefault(cells[result["cell"]], []).append(result)
    return found


def accuracy(split: str) -> Column:
    """Accuracy of one task in %."""
    return lambda result: 100 * result[split]["accuracy"]


def mean_over_tasks(figure: Column) -> Column:
    """The mean of a figure over a result's tasks."""
    return lambda result: statistics.mean(figure(task) for task in result["tasks"].values())


def of_task(task: str, figure: Column) -> Column:
    """A figure of one of a result's tasks."""
    return lambda result: figure(result["tasks"][task])


def percent_owned(result: Result) -> float:
    """What a task owns in % of the base."""
    return 100 * result["own_fraction"]


def alone_tables(folder: Path, config: Result) -> None:
    """Patches over logits that train, and over fixed random ones."""
    names = {"linear_probe": "logits", "scale_bias": "scale_bias", "depthwise_patch": "both"}
    cells = read(folder / "patches", "kind").get("alone", {})
    order = [*names.values(), *config["alone"]["cells"]]
    for task in config["alone"]["epochs"]:
        mine = {c: [r for r in rows if r["task"] == task] for c, rows in cells.items()}
        found = {c: rows for c, rows in mine.items() if rows} | of_vision(
            folder / "vision", names, task
        )
        columns = {"test": accuracy("test"), "validation": accuracy("val"), "owned": percent_owned}
        print(f"\n**alone, {task}: accuracy and owned parameters in %**\n")
        print(table(found, order, columns))


def all_domains(title: str, cells: dict[str, Seeds], order: list[str], tasks: list[str]) -> None:
    """Means over the domains, and each of them."""
    columns: dict[str, Column] = {
        "test, mean": mean_over_tasks(accuracy("test")),
        "validation, mean": mean_over_tasks(accuracy("val")),
        "owned, mean": mean_over_tasks(percent_owned),
    }
    columns |= {task.removeprefix("pacs_"): of_task(task, accuracy("test")) for task in tasks}
    columns |= {
        f"{task.removeprefix('pacs_')}, owned": of_task(task, percent_owned) for task in tasks
    }
    print(f"\n**{title}: accuracy and owned parameters in %**\n")
    print(table(cells, order, columns))


def sequential(folder: Path, cells: dict[str, str], tasks: list[str]) -> dict[str, Seeds]:
    """Cells of vision.py, one task each, as results of all tasks by seed."""
    found: dict[str, dict[int, Result]] = {}
    for task in tasks:
        for cell, rows in of_vision(folder, cells, task).items():
            for row in rows:
                by_seed = found.setdefault(cell, {})
                by_seed.setdefault(row["seed"], {"tasks": {}})["tasks"][task] = row
    whole = {c: [r for r in s.values() if len(r["tasks"]) == len(tasks)] for c, s in found.items()}
    return {cell: rows for cell, rows in whole.items() if rows}


def cascade_tables(folder: Path, config: Result) -> None:
    """Each size alone, and cascades at the thresholds that were chosen on validation."""
    cells = read(folder / "patches", "kind").get("cascade", {})
    sizes = config["cascade"]["sizes"]
    for task in config["cascade"]["epochs"]:
        found: dict[str, Seeds] = {}
        for cell, rows in cells.items():
            for result in (r for r in rows if r["task"] == task):
                for size, cost in zip(sizes, result["multiply_adds"], strict=True):
                    row = {**result["alone"][str(size)], "cost": cost, "last": 1.0}
                    found.setdefault(f"{cell}, {size} px", []).append(row)
                for chosen in result["chosen"]:
                    tested, val = chosen["test"], chosen["val"]
                    row = {"test": tested, "val": val, "cost": tested["multiply_adds"]}
                    name = f"{cell}, cascade, {100 * chosen['tolerance']:.0f} points given up"
                    row["last"] = tested["shares"][-1]
                    found.setdefault(name, []).append(row)
        columns: dict[str, Column] = {
            "test": accuracy("test"),
            "validation": accuracy("val"),
            "million multiply-adds": lambda r: r["cost"] / 1e6,
            "rows at the last size": lambda r: 100 * r["last"],
        }
        print(f"\n**cascade, {task}: accuracy in %, multiply-adds a row**\n")
        print(table(found, sorted(found, key=_place), columns))


def _place(name: str) -> tuple[str, bool, str]:
    """Sizes before cascades within each cell."""
    cell, what = name.split(", ", 1)
    return cell, what.startswith("cascade"), what


def main() -> None:
    """Print the tables of what is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    config = yaml.safe_load((HERE / "patches.yaml").read_text())
    joint = yaml.safe_load((HERE / "joint.yaml").read_text())
    alone_tables(folder, config)
    together = config["together"]
    cells = read(folder / "patches", "kind").get("together", {})
    all_domains("together", cells, list(together["cells"]), together["tasks"])
    cascade_tables(folder, config)
    names = {"full_finetune": "a network each", "taps_1": "sequential_1"}
    before = sequential(folder / "vision", names, joint["tasks"])
    after = {c: r for group in read(folder / "joint", "cell").values() for c, r in group.items()}
    shared = {"one network": cells["logits"]} if "logits" in cells else {}
    order = [*names.values(), *shared, *joint["cells"]]
    all_domains("joint TAPS", before | shared | after, order, joint["tasks"])


if __name__ == "__main__":
    main()
