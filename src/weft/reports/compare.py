"""Means, spreads and the Pareto front of a comparison of methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .records import Point


@dataclass(frozen=True)
class Summary:
    """One method in a comparison: what is shown as one marker.

    Args:
        method: its name.
        metric: name of the score.
        runs: by complete seed, mean own bytes and mean score over the tasks.
        tasks: how many tasks a complete seed has.
        own_fraction: mean over tasks and seeds.
        left_out: seeds that lack a task or have a score that is not finite.
        higher_is_better: direction of the score.
    """

    method: str
    metric: str
    runs: tuple[tuple[float, float], ...]
    tasks: int
    own_fraction: float
    left_out: int
    higher_is_better: bool = True

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(s for _, s in self.runs)

    @property
    def own_bytes(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(b for b, _ in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the score over seeds; None for a single seed."""
        return statistics.stdev(s for _, s in self.runs) if len(self.runs) > 1 else None

    @property
    def bytes_spread(self) -> float | None:
        """Sample standard deviation of the own bytes over seeds; None for a single seed."""
        return statistics.stdev(b for b, _ in self.runs) if len(self.runs) > 1 else None


def metrics_of(points: Sequence[Point]) -> list[str]:
    """The metrics of a comparison, in order of appearance."""
    return list(dict.fromkeys(p.metric for p in points))


def tasks_of(points: Sequence[Point], metric: str) -> list[str]:
    """The tasks that have this metric, in order of appearance."""
    return list(dict.fromkeys(p.task for p in points if p.metric == metric))


def summarise(
    points: Sequence[Point], metric: str, tasks: Sequence[str] | None = None
) -> list[Summary]:
    """One summary per method: tasks are averaged within a seed, then seeds against each other.

    A seed counts only if it has a finite score for every task; otherwise methods would be averaged
    over different tasks.

    Args:
        points: all runs.
        metric: which of their metrics.
        tasks: over which tasks; default: all that have the metric.

    Returns:
        Summaries in order of appearance; one without a complete seed has no runs.
    """
    wanted = list(tasks) if tasks is not None else tasks_of(points, metric)
    chosen = [p for p in points if p.metric == metric and p.task in wanted]
    summaries = []
    for method in dict.fromkeys(p.method for p in chosen):
        by_seed: dict[int, dict[str, Point]] = {}
        for p in chosen:
            if p.method == method:
                by_seed.setdefault(p.seed, {})[p.task] = p
        complete = [
            list(found.values())
            for _, found in sorted(by_seed.items())
            if len(found) == len(wanted) and all(math.isfinite(p.score) for p in found.values())
        ]
        summaries.append(
            Summary(
                method,
                metric,
                tuple(
                    (
                        statistics.fmean(p.own_bytes for p in found),
                        statistics.fmean(p.score for p in found),
                    )
                    for found in complete
                ),
                len(wanted),
                statistics.fmean([p.own_fraction for found in complete for p in found] or [0.0]),
                len(by_seed) - len(complete),
                chosen[0].higher_is_better,
            )
        )
    return summaries


def pareto_front(summaries: Sequence[Summary]) -> list[Summary]:
    """The methods that no other one beats: none owns as little and scores as well, one better.

    Args:
        summaries: of one metric.

    Returns:
        The front, from the fewest own bytes to the most.
    """
    placed = [s for s in summaries if s.runs]

    def beats(a: Summary, b: Summary) -> bool:
        gain = a.score - b.score if a.higher_is_better else b.score - a.score
        saved = b.own_bytes - a.own_bytes
        return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)

    front = [s for s in placed if not any(beats(other, s) for other in placed)]
    return sorted(front, key=lambda s: s.own_bytes)
