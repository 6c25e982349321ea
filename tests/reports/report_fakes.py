"""Made-up ledgers, histories and comparisons, like those of real runs."""

from __future__ import annotations

import math
import random
from typing import Any

from weft.core.ledger import Ledger, Row
from weft.reports import Point, TaskReport

METHODS = {
    "linear_probe": (0, 0.70),
    "bias_only": (70_000, 0.775),
    "scale_bias": (150_000, 0.80),
    "depthwise_patch": (420_000, 0.81),
    "hard_sharing": (3_600_000, 0.835),
    "taps": (1_650_000, 0.858),
    "full_finetune": (8_900_000, 0.862),
}


def fake_ledger(task: str, gates: int = 52, *, seed: int = 0, norms: bool = True) -> Ledger:
    """A ledger like that of MobileNetV2 under taps: gated layers and own normalisations."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(gates):
        stage, layer = i // 9, i % 9
        site = f"blocks.{stage}.{layer // 3}.conv_{('pw', 'dw', 'pwl')[layer % 3]}"
        size = int(900 * 1.11**i)
        score = max(0.0, rng.gauss(0.02 + 0.12 * (i % 13) / 12, 0.06))
        own = size if score >= 0.1 else 0
        kind = "depthwise" if layer % 3 == 1 else "layer"
        rows.append(Row(f"{site}.weight", site, kind, own == 0, False, size, own, own * 4, score))
        if norms:
            norm = site.replace("conv_", "bn_")
            n = 16 + 8 * i
            for tensor, buffer in (("weight", False), ("bias", False), ("running_mean", True)):
                rows.append(Row(f"{norm}.{tensor}", norm, "norm", False, buffer, n, n, n * 4, None))
    return Ledger(task, tuple(rows), head_parameters=1280 * 10 + 10, head_bytes=4 * 12810)


def fake_history(epochs: int = 30, gates: int = 52, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows like those of a taps run: warm-up, selection, hardening."""
    rng = random.Random(seed)
    rows = []
    opened = gates
    for e in range(1, epochs + 1):
        phase = "warm-up" if e <= 3 else "select" if e <= 0.7 * epochs else "harden"
        if phase == "select":
            opened = int(gates * (0.3 + 0.7 * math.exp(-(e - 3) / 6)))
        accuracy = 0.9 - 0.6 * math.exp(-e / 5) + rng.gauss(0, 0.006)
        rows.append(
            {
                "epoch": e,
                "phase": phase,
                "loss": 0.15 + 2.4 * math.exp(-e / 4) + abs(rng.gauss(0, 0.02)),
                "val": {
                    "accuracy": accuracy,
                    "loss": 0.4 + 1.9 * math.exp(-e / 4) + abs(rng.gauss(0, 0.03)),
                },
                "penalty": 0.1,
                "open_gates": opened,
                "gates": gates,
                "own_fraction": opened / gates,
                "lr": 0.01,
                "seconds": 3.0,
            }
        )
    return rows


def fake_report(name: str, gates: int = 52, *, seed: int = 0, norms: bool = True) -> TaskReport:
    """A task report with everything in it."""
    metrics = {"test accuracy": 0.80 + 0.03 * (seed % 5), "val accuracy": 0.83, "test loss": 0.61}
    ledger = fake_ledger(name, gates, seed=seed, norms=norms)
    return TaskReport(name, "taps", ledger, metrics, fake_history(gates=gates, seed=seed))


def fake_points(tasks: int = 5, seeds: int = 3) -> list[Point]:
    """Runs of seven methods on some tasks with some seeds."""
    rng = random.Random(1)
    return [
        Point(
            method,
            f"task {t}",
            seed,
            level - 0.04 * t + rng.gauss(0, 0.008),
            int(size * rng.uniform(0.93, 1.07)),
            size / 8_900_000,
            "test accuracy",
        )
        for method, (size, level) in METHODS.items()
        for t in range(tasks)
        for seed in range(seeds)
    ]
