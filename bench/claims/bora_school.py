"""BoRA's prior on 139 schools: explained variance of exam scores against the precision tau.

Every school is a task: a linear function of 28 columns and a constant. The file's rows are split
anew for each seed, school by school, in the shares of the file (60, 10, 30 %). The most probable
tensors are solved exactly, and found by training with weft at some of the precisions. tau is in
units of the noise's precision; 0 is each school alone, the largest is one function for all.

Run with: python bench/claims/bora_school.py --data DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from bora import Array, Made, solved, trained

TAUS = (0.0, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e5)
TRAINED = (100.0, 300.0, 1000.0)
SPLITS = ("train", "val", "test")


def read(file: Path) -> tuple[Array, Array, Array]:
    """Columns with a constant, scores, and the school of every row."""
    with np.load(file) as arrays:
        x = np.concatenate([arrays[f"x_num_{s}"] for s in SPLITS]).astype(np.float64)
        y = np.concatenate([arrays[f"y_score_{s}"] for s in SPLITS]).astype(np.float64)
        school = np.concatenate([arrays[f"task_{s}"] for s in SPLITS]).astype(np.float64)
    return np.concatenate([x, np.ones((len(x), 1))], 1), y, school


def split(x: Array, y: Array, school: Array, seed: int) -> dict[str, Made]:
    """Schools as tasks: columns and scores in units of the training rows' deviations."""
    generator = np.random.default_rng(seed)
    place = np.empty(len(y), dtype=int)
    for name in np.unique(school):
        rows = generator.permutation(np.flatnonzero(school == name))
        first, second = max(1, round(0.6 * len(rows))), max(2, round(0.7 * len(rows)))
        place[rows[:first]], place[rows[first:second]], place[rows[second:]] = 0, 1, 2
    inside = place == 0
    spread = x[inside].std(0)
    constant = spread < 1e-9
    centre = np.where(constant, 0.0, x[inside].mean(0))
    x = (x - centre) / np.where(constant, 1.0, spread)
    y = (y - y[inside].mean()) / y[inside].std()
    # A constant for all schools has the column of ones to itself.
    x = x[:, [*np.flatnonzero(~constant), x.shape[1] - 1]]
    nothing = np.zeros(x.shape[1])
    return {
        name: [
            (x[rows], y[rows], nothing)
            for school_name in np.unique(school)
            for rows in [np.flatnonzero((school == school_name) & (place == i))]
        ]
        for i, name in enumerate(SPLITS)
    }


def explained(made: Made, found: list[Array], chosen: list[int]) -> float:
    """Explained variance in % over the rows of some schools."""
    errors = np.concatenate([made[i][1] - made[i][0] @ found[i] for i in chosen])
    truth = np.concatenate([made[i][1] for i in chosen])
    return float(100 * (1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum()))


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trained-seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=300)
    out = Path(__file__).parent / "results" / "bora" / "school.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    read_once = read(given.data / "school.npz")
    rows = []
    print("| tau | small schools | large schools | all | validation | trained, all |")
    print("|---|---|---|---|---|---|")
    for tau in TAUS:
        line: dict[str, list[float]] = {k: [] for k in ("small", "large", "all", "val", "trained")}
        for seed in range(given.seeds):
            parts = split(*read_once, seed)
            order = np.argsort([len(y) for _, y, _ in parts["train"]], kind="stable").tolist()
            third = len(order) // 3
            found = solved(parts["train"], tau)
            line["small"].append(explained(parts["test"], found, order[:third]))
            line["large"].append(explained(parts["test"], found, order[-third:]))
            line["all"].append(explained(parts["test"], found, order))
            line["val"].append(explained(parts["val"], found, order))
            if tau in TRAINED and seed < given.trained_seeds:
                ours = trained(parts["train"], tau, given.epochs)
                line["trained"].append(explained(parts["test"], ours, order))
        rows.append({"tau": tau, **line})
        texts = [
            f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" if len(v) > 1 else ""
            for v in line.values()
        ]
        print(f"| {tau:g} | {' | '.join(texts)} |", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
