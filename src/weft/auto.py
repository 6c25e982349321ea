"""Cheap methods first: for each task, stop paying where more bytes gain no more than noise.

The steps are tried in the order of what a task would own. After each, a task's validation score is
compared with the best one so far. ``patience`` steps in a row without a gain end its way; a dearer
method may gain where a cheaper one did not, so one such step is not enough. A gain counts if it is
larger than ``threshold`` standard errors, where

    error^2 = (s_a^2 + s_b^2) / n + s_d^2 / m.

s_a and s_b are the standard deviations over the n seeds of the two steps. For classification, s_d
is the standard deviation over the m validation rows of the difference between the two steps in how
often a row is right (mean over the seeds): a paired comparison, because both are scored on the same
rows. Other tasks have the first part alone, so for them other validation rows might decide
otherwise, and two seeds see it roughly: of steps that gain nothing, a threshold of 2 keeps about 9
in 100 with two seeds and 6 in 100 with three (Student's t with 2 (n - 1) degrees of freedom).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import yaml
from safetensors.torch import load

from .bank import Bank
from .bank.store import BANK
from .comparing import Comparison, Fleet, make_fleet, run_fleet
from .comparing.cells import CORRECT, Cell
from .comparing.config import MethodChoice
from .comparing.files import put
from .config import Experiment
from .errors import ConfigError, DataError, TrainingError
from .planning.assembling import gather

LADDER = (
    MethodChoice(name="linear_probe"),
    MethodChoice(name="scale_bias"),
    MethodChoice(name="taps", options={"budget": 0.1}),
    MethodChoice(name="taps", options={"budget": 0.4}),
    MethodChoice(name="full_finetune"),
)
"""The steps, from the fewest own bytes to the most."""

DOCUMENT = "auto.yaml"
"""Where it is written what was tried."""


@final
@dataclass(frozen=True)
class Step:
    """One step of one task.

    Args:
        method: with its options.
        val: mean validation score over the seeds; None if it could not be trained.
        test: mean test score; None without test data.
        own_bytes: the largest over the seeds.
        gain: over the best step before; None for the first.
        error: standard error of the gain.
        said: what was decided, and why.
    """

    method: str
    val: float | None
    test: float | None
    own_bytes: int | None
    gain: float | None
    error: float | None
    said: str


@final
@dataclass(frozen=True)
class Climb:
    """What was tried for the tasks of an experiment.

    Args:
        bank: the best step of every task, of each the seed that is best on validation.
        steps: by task, in order.
        chosen: by task, the step that was kept.
        metric: by task, the score's name.
    """

    bank: Bank
    steps: Mapping[str, tuple[Step, ...]]
    chosen: Mapping[str, Step]
    metric: Mapping[str, str]

    def summary(self, task: str) -> str:
        """What a task owns in the end, and why no more is paid for it, in a sentence or two."""
        step, steps = self.chosen[task], self.steps[task]
        metric = self.metric[task]
        said = f"{task} owns {step.own_bytes:,} bytes by {step.method}"
        if step.gain is not None:
            said += f": {step.gain:+.4f} {metric} ± {step.error:.4f} over the best cheaper step"
        later = [s for s in steps[steps.index(step) + 1 :] if s.gain is not None]
        if not later:
            return f"{said}. It is the last step that could be tried."
        refused = "; ".join(f"{s.method} {s.gain:+.4f} ± {s.error:.4f}" for s in later)
        return f"{said}. Not worth their bytes: {refused}."


@dataclass
class _Way:
    """The way of a task up the steps, so far."""

    steps: list[Step] = field(default_factory=list)
    best: list[Cell] = field(default_factory=list)
    kept: Step | None = None
    idle: int = 0


def climb(
    experiment: Experiment,
    *,
    seeds: int = 2,
    threshold: float = 2.0,
    patience: int = 2,
    jobs: int = 1,
    progress: bool = True,
    told: Callable[[str], None] | None = None,
) -> Climb:
    """Train the tasks of an experiment by dearer and dearer methods, as long as it pays.

    Every step is a part of a comparison in ``<output>/auto``: interrupted, it goes on when called
    again, and `weft.report` shows it.

    Args:
        experiment: its base, tasks, data and training; its method is not used.
        seeds: how often each step is trained, >= 2.
        threshold: standard errors that a gain must exceed, >= 0.
        patience: steps in a row without a gain after which a task stops, >= 1.
        jobs: processes that train at the same time, >= 1.
        progress: whether to show progress.
        told: called with a sentence for each decision.

    Returns:
        What was tried and kept; ``<output>/bank`` and ``<output>/auto.yaml`` hold it.

    Raises:
        ConfigError: an option out of range, or an experiment that says more than this can use.
        TrainingError: no step of a task could be trained, or another process is at it.
    """
    _check(experiment, seeds, threshold, patience)
    root = Path(experiment.output)
    ways = {name: _Way() for name in experiment.tasks}
    comparison, failed = None, set[str]()
    for choice in LADDER:
        going = tuple(name for name, way in ways.items() if way.idle < patience)
        if not going:
            break
        first = comparison is None
        comparison = _comparison(experiment, comparison, choice, going, seeds)
        fleet = make_fleet(comparison)
        # A step is tried once: what failed in an earlier one was judged with that.
        result = run_fleet(fleet, jobs=jobs, progress=progress, check_data=first, skip=failed)
        failed |= set(result.failed)
        if result.elsewhere:
            raise TrainingError(
                f"Another process trains {', '.join(result.elsewhere)}. Wait for it, and run again."
            )
        fresh = _of_step(fleet, choice)
        for name in going:
            cells = [cell for cell in fresh if name in cell.tasks]
            why = next((result.failed[c.name] for c in cells if c.name in result.failed), "")
            said = _judge(name, ways[name], cells, why, threshold)
            if told is not None:
                told(f"{name}: {said}")
    lost = [name for name, way in ways.items() if way.kept is None]
    if lost:
        reasons = "; ".join(f"{n}: {ways[n].steps[-1].said}" for n in lost)
        raise TrainingError(f"Nothing could be trained for {', '.join(lost)}. {reasons}")
    best = [_best_cell(way.best, name) for name, way in ways.items()]
    found = Climb(
        Bank(root / "bank"),
        {name: tuple(way.steps) for name, way in ways.items()},
        {name: way.kept for name, way in ways.items() if way.kept is not None},
        {name: _row(way.best[0], name)["metric"] for name, way in ways.items()},
    )
    # First the file, which says that what is in the bank may be replaced.
    put(root / DOCUMENT, yaml.safe_dump(_plain(found, seeds, threshold, patience)).encode())
    gather(best, found.bank, replace=True)
    return found


def ladder(experiment: Experiment, seeds: int) -> Fleet:
    """All steps of all tasks, for looking at before any training."""
    comparison = None
    for choice in LADDER:
        comparison = _comparison(experiment, comparison, choice, tuple(experiment.tasks), seeds)
    assert comparison is not None
    return make_fleet(comparison)


def _check(experiment: Experiment, seeds: int, threshold: float, patience: int) -> None:
    if seeds < 2:
        raise ConfigError(f"seeds: found {seeds}; noise is seen with 2 or more.")
    if not 0 <= threshold < math.inf:
        raise ConfigError(f"threshold: found {threshold}, expected a number of at least 0.")
    if patience < 1:
        raise ConfigError(f"patience: found {patience}, expected at least 1.")
    if experiment.pretrain is not None:
        raise ConfigError("pretrain: the cheap methods stand on the base as it is. Leave it out.")
    if experiment.train.joint:
        raise ConfigError("train.joint: each task goes as far as it pays for it. Leave it out.")
    for name, section in experiment.tasks.items():
        if section.method is not None:
            raise ConfigError(
                f"tasks.{name}.method: the method is what is looked for. Leave it out."
            )
    bank = Path(experiment.output) / "bank"
    if (bank / BANK).is_file() and not (bank.parent / DOCUMENT).is_file():
        raise ConfigError(f"{bank} holds tasks that were trained otherwise. Use another output.")


def _comparison(
    experiment: Experiment,
    before: Comparison | None,
    choice: MethodChoice,
    tasks: tuple[str, ...],
    seeds: int,
) -> Comparison:
    """The steps so far and one more, for the tasks that go on."""
    chosen = choice.model_copy(update={"tasks": tasks})
    return Comparison(
        base=experiment.base,
        tasks=experiment.tasks,
        methods=(*(() if before is None else before.methods), chosen),
        seeds=tuple(range(seeds)),
        data=experiment.data,
        train=experiment.train,
        output=str(Path(experiment.output) / "auto"),
        seed=experiment.seed,
    )


def _of_step(fleet: Fleet, choice: MethodChoice) -> list[Cell]:
    """The cells of one step."""
    methods = [(cell, cell.experiment.method) for cell in fleet.cells]
    return [c for c, m in methods if (m.name, m.options) == (choice.name, choice.options)]


def _judge(name: str, way: _Way, cells: Sequence[Cell], failure: str, threshold: float) -> str:
    """Add a step to a task's way, keep it if it pays, and say so."""
    label = cells[0].label
    if not failure and any(_val(cell, name) is None for cell in cells):
        failure = "no validation score; the data needs validation rows that can be scored"
    if failure:
        way.steps.append(Step(label, None, None, None, None, None, f"left out: {failure}"))
        return f"{label} left out: {failure}"
    rows = [_row(cell, name) for cell in cells]
    tests = [row["scores"]["test"].get(row["metric"]) for row in rows]
    size = max(row["own_bytes"] for row in rows)
    val = statistics.fmean(_known(cell, name) for cell in cells)
    gain = error = None
    if way.kept is None:
        pays, said = True, f"{val:.4f} to begin with"
    else:
        gain, error = gain_and_error(name, way.best, cells)
        pays = gain > threshold * error
        what = "kept" if pays else "within the noise" if gain >= -threshold * error else "worse"
        said = f"{gain:+.4f}, standard error {error:.4f}: {what}"
    test = None if None in tests else statistics.fmean(tests)
    step = Step(label, val, test, size, gain, error, said)
    way.steps.append(step)
    if pays:
        way.kept, way.best, way.idle = step, list(cells), 0
    else:
        way.idle += 1
    return f"{label} ({size:,} bytes) {said}"


def gain_and_error(name: str, before: Sequence[Cell], after: Sequence[Cell]) -> tuple[float, float]:
    """What a step gains on validation, and the standard error of that (see the module's head).

    Args:
        name: the task.
        before: finished cells of one step, a seed each, at least 2.
        after: likewise of the other, with as many seeds.
    """
    sign = 1.0 if _row(after[0], name)["higher_is_better"] else -1.0
    one, other = ([sign * _known(cell, name) for cell in cells] for cells in (before, after))
    squared = (statistics.variance(one) + statistics.variance(other)) / len(one)
    if _row(after[0], name)["metric"] == "accuracy" and _kind(after[0], name) == "classification":
        right = [torch.stack([correct(c, name) for c in cells]) for cells in (before, after)]
        difference = right[1].mean(0) - right[0].mean(0)
        squared += float(difference.var()) / len(difference)
    return statistics.fmean(other) - statistics.fmean(one), math.sqrt(squared)


def correct(cell: Cell, name: str) -> torch.Tensor:
    """Which validation rows a finished cell has right, shape (rows,), 1 or 0.

    Raises:
        DataError: the cell does not say, or its file is damaged.
    """
    file = cell.file(CORRECT)
    try:
        return load(file.read_bytes())[name].double()
    except Exception as error:  # what a damaged file raises depends on its bytes
        raise DataError(
            f"{file} cannot be read: {error}. Remove the cell's folder to train it anew."
        ) from error


def _kind(cell: Cell, name: str) -> str:
    return cell.experiment.tasks[name].kind


def _row(cell: Cell, name: str) -> dict[str, Any]:
    result = cell.result()
    assert result is not None
    row: dict[str, Any] = next(row for row in result["rows"] if row["task"] == name)
    return row


def _val(cell: Cell, name: str) -> float | None:
    """The validation score; None without one."""
    row = _row(cell, name)
    score = (row["scores"].get("val") or {}).get(row["metric"])
    return None if score is None else float(score)


def _known(cell: Cell, name: str) -> float:
    """The validation score of a step that was judged, which has one."""
    score = _val(cell, name)
    assert score is not None
    return score


def _best_cell(cells: Sequence[Cell], name: str) -> Cell:
    """The seed that is best on validation."""
    sign = 1.0 if _row(cells[0], name)["higher_is_better"] else -1.0
    return max(cells, key=lambda cell: sign * _known(cell, name))


def _plain(found: Climb, seeds: int, threshold: float, patience: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "threshold": threshold,
        "patience": patience,
        "tasks": {
            name: {
                "chosen": found.chosen[name].method,
                "metric": found.metric[name],
                "said": found.summary(name),
                "steps": [asdict(step) for step in steps],
            }
            for name, steps in found.steps.items()
        },
    }
