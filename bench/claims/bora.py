"""BoRA's prior where the truth is known: excess error of linear tasks against the precision tau.

Twelve tasks y = x theta_t + noise of deviation 1, in 20 dimensions, with theta_t around a common
mean with a deviation of 0.5, so that the true precision is 4. Six have 24 rows, six have 120. The
most probable tensors are solved exactly, and found by training with weft. Excess error is
|theta - true theta|^2, what the mean squared error of new rows has above the noise's. tau = 0 is
training each task alone (least squares; training starts at 0).

Run with: python bench/claims/bora.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import weft

Array = NDArray[np.float64]
Made = list[tuple[Array, Array, Array]]
SIZE, SPREAD = 20, 0.5
COUNTS = (24,) * 6 + (120,) * 6
TAUS = (0.0, 0.1, 1.0, 4.0, 10.0, 100.0, 1000.0)


def tasks(seed: int) -> Made:
    """Inputs, targets and true tensors of every task."""
    generator = np.random.default_rng(seed)
    mean, made = generator.normal(size=SIZE), []
    for count in COUNTS:
        x = generator.normal(size=(count, SIZE))
        theta = mean + SPREAD * generator.normal(size=SIZE)
        made.append((x, x @ theta + generator.normal(size=count), theta))
    return made


def solved(made: Made, tau: float) -> list[Array]:
    """The most probable tensors: (X'X + tau) theta_t = X'y + tau Theta, Theta their mean."""
    size = made[0][0].shape[1]
    if tau == 0:
        return [np.linalg.lstsq(x, y, rcond=None)[0] for x, y, _ in made]
    inverse = [np.linalg.inv(x.T @ x + tau * np.eye(size)) for x, _, _ in made]
    own = [inverse[i] @ x.T @ y for i, (x, y, _) in enumerate(made)]
    pull = np.eye(size) - tau * sum(inverse) / len(made)
    mean = np.linalg.solve(pull, sum(own) / len(made))
    return [o + tau * inverse[i] @ mean for i, o in enumerate(own)]


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    """The negative log-likelihood of a row, but for a constant."""
    return 0.5 * (output.squeeze(1) - target).square().mean()


def trained(made: Made, tau: float, epochs: int) -> list[Array]:
    """What training with weft finds."""
    size, counts = made[0][0].shape[1], [len(y) for _, y, _ in made]
    base = nn.Sequential(nn.Linear(size, 1, bias=False))
    nn.init.zeros_(base[0].weight)
    average = float(np.mean(counts))
    plan = weft.tie_to_mean(weft.full_finetune(base), base, tau, rows=average)
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, size))
    data = {}
    for i, (x, y, _) in enumerate(made):
        model.add_task(f"t{i}", weft.Task(head=nn.Identity(), loss=half_squares))
        data[f"t{i}"] = [(torch.tensor(x).float(), torch.tensor(y).float())]
    weights = {f"t{i}": count / average for i, count in enumerate(counts)}
    # SGD stays under 2 over the largest curvature, of the data or of the charge.
    curved = max(np.linalg.eigvalsh(x.T @ x)[-1] for x, _, _ in made) / average
    lr = 1.0 / (curved + (len(made) + 1) * tau / average)
    weft.fit(model, data, epochs=epochs, lr=lr, weights=weights, keep="last", progress=False)
    return [
        model.tasks[f"t{i}"].own["0.weight"].detach().double().numpy().ravel()
        for i in range(len(made))
    ]


def excess(made: Made, found: list[Array]) -> tuple[float, float]:
    """Mean excess error of the small tasks and of the large ones."""
    errors = [float(((f - theta) ** 2).sum()) for f, (_, _, theta) in zip(found, made, strict=True)]
    return statistics.fmean(errors[:6]), statistics.fmean(errors[6:])


def main() -> None:
    """Print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=400)
    out = Path(__file__).parent / "results" / "bora" / "linear.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| tau | small, exact | large, exact | small, trained | large, trained |")
    print("|---|---|---|---|---|")
    for tau in TAUS:
        line: dict[str, list[float]] = {k: [] for k in ("se", "le", "st", "lt")}
        for seed in range(given.seeds):
            made = tasks(seed)
            for small, large, found in (
                ("se", "le", solved(made, tau)),
                ("st", "lt", trained(made, tau, given.epochs)),
            ):
                one, other = excess(made, found)
                line[small].append(one)
                line[large].append(other)
        rows.append({"tau": tau, **line})
        texts = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in line.values()]
        print(f"| {tau:g} | {' | '.join(texts)} |", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
