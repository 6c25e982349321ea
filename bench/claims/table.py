"""The results of vision.py as Markdown tables.

Run with: python bench/claims/table.py [NAME]   (of vision, its default, or of rcm: NAME.yaml)
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
Results = dict[tuple[str, str], list[dict[str, Any]]]


def read(folder: Path) -> Results:
    """By cell and data set, the results of all seeds."""
    found: Results = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        found[result["cell"], result["task"]].append(result)
    return found


def spread(values: list[float]) -> str:
    """Mean, standard deviation between seeds, and the number of seeds if it is not three."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text if len(values) == 3 else f"{text} ({len(values)})"


def table(results: Results, cells: list[str], tasks: list[str], what: str) -> str:
    """One table: a row per cell, a column per data set."""
    lines = [
        "| | " + " | ".join(t.removeprefix("pacs_") for t in tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for cell in cells:
        columns = []
        for task in tasks:
            rows = results.get((cell, task), [])
            columns.append(_cell(rows, what) if rows else "-")
        lines.append(f"| {cell} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], what: str) -> str:
    if what == "own":
        share = statistics.mean(100 * r["own_fraction"] for r in rows)
        if not rows[0]["gates"]:
            return f"{share:.1f} %"
        gates = [r["open_gates"] for r in rows]
        return f"{share:.0f} % ({min(gates)}-{max(gates)} gates)"
    if what == "bytes":
        return f"{statistics.mean(r['bytes_on_disk'] for r in rows) / 1000:.0f} kB"
    return spread([100 * r[what]["accuracy"] for r in rows])


def main() -> None:
    """Print the tables of test and validation accuracy, ownership and bytes."""
    name = sys.argv[1] if len(sys.argv) > 1 else "vision"
    config = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    results = read(HERE / "results" / name)
    cells, tasks = list(config["cells"]), list(config["tasks"])
    titles = {
        "test": "Test accuracy in %, last epoch",
        "val": "Validation accuracy in %, last epoch",
        "own": "Owned parameters and open gates",
        "bytes": "Bytes on disk, without the head",
    }
    for what, title in titles.items():
        print(f"\n**{title}**\n\n{table(results, cells, tasks, what)}")


if __name__ == "__main__":
    main()
