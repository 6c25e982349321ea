"""What can be chosen for a task: a method with its options, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, final

from weft.errors import DataError, PlanError

if TYPE_CHECKING:
    import pandas as pd

NEEDED = (
    "task", "label", "method", "options", "train", "seed", "cell", "metric", "higher_is_better",
    "val", "test", "own_bytes", "head_bytes", "shared_bytes", "base_bytes",
)  # fmt: skip


Split = Literal["val", "test"]


@final
@dataclass(frozen=True)
class Scores:
    """The scores of one task by one choice, a value for each seed.

    Args:
        metric: its name.
        sign: -1 where smaller is better, else 1.
        val: on validation.
        test: on test; empty where there is none.
        own_bytes: what the task owns, without its head.
        head_bytes: of its head.
    """

    metric: str
    sign: float
    val: tuple[float, ...]
    test: tuple[float, ...]
    own_bytes: tuple[int, ...]
    head_bytes: tuple[int, ...]

    def on(self, split: Split) -> tuple[float, ...]:
        """The scores on a split."""
        return self.val if split == "val" else self.test


@final
@dataclass(frozen=True)
class Choice:
    """A method with its options, for one task or for all that it trains together.

    Args:
        label: as people read it.
        method: its name.
        options: JSON.
        train: what differs in training, JSON.
        seeds: of the cells that it is averaged over.
        cells: their names.
        scores: by task.
        shared_bytes: by seed, of tensors that the tasks share beside the base.
    """

    label: str
    method: str
    options: str
    train: str
    seeds: tuple[int, ...]
    cells: tuple[str, ...]
    scores: Mapping[str, Scores]
    shared_bytes: tuple[int, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it covers."""
        return tuple(self.scores)

    def bytes(self, *, heads: bool) -> int:
        """What it costs: own bytes of its tasks and what they share, once.

        Seeds differ in what they own; the largest counts, so that any of them fits.

        Args:
            heads: whether heads count.
        """
        return max(self.bytes_of(place, heads=heads) for place in range(len(self.seeds)))

    def bytes_of(self, place: int, *, heads: bool) -> int:
        """What the cell of one seed costs."""
        own = sum(s.own_bytes[place] for s in self.scores.values())
        head = sum(s.head_bytes[place] for s in self.scores.values()) if heads else 0
        return own + head + self.shared_bytes[place]

    def best_seed(self, *, heads: bool) -> int:
        """The place among the seeds of the cell that is best on validation, then smallest."""

        def rank(place: int) -> tuple[float, int, int]:
            mean = fmean(s.sign * s.val[place] for s in self.scores.values())
            return -mean, self.bytes_of(place, heads=heads), place

        return min(range(len(self.seeds)), key=rank)


@final
@dataclass(frozen=True)
class Choices:
    """Everything that can be chosen.

    Args:
        tasks: to be covered.
        choices: complete ones, with a validation score for every seed.
        seeds: that scores are averaged over.
        base_bytes: of the base.
        left_out: by label and tasks, why it cannot be chosen.
    """

    tasks: tuple[str, ...]
    choices: tuple[Choice, ...]
    seeds: tuple[int, ...]
    base_bytes: int
    left_out: Mapping[str, str]


def read_choices(
    frame: pd.DataFrame,
    *,
    tasks: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
    max_seeds: int | None = None,
    expected: Sequence[tuple[str, tuple[str, ...]]] = (),
) -> Choices:
    """Group a comparison's table by what can be chosen.

    Args:
        frame: the table of `weft.compare`.
        tasks: to be covered; default those of the table.
        seeds: of the comparison; default those of the table.
        max_seeds: use at most so many seeds, the first ones, >= 1.
        expected: label and tasks of every cell, so that those without any result are named.

    Raises:
        DataError: a column is missing, or there are no results.
        PlanError: a task has no complete results.
    """
    missing = [column for column in NEEDED if column not in frame.columns]
    if missing or frame.empty:
        what = f"has no column {', '.join(missing)}" if missing else "is empty"
        raise DataError(f"The table of the comparison {what}. Give what weft.compare returns.")
    if max_seeds is not None and max_seeds < 1:
        raise DataError(f"max_seeds is a whole number of at least 1, found {max_seeds}.")
    columns = frame[list(NEEDED)].astype(object)
    rows = columns.where(frame[list(NEEDED)].notna(), None).to_dict("records")
    every = seeds or tuple(dict.fromkeys(int(row["seed"]) for row in rows))
    needed = every[:max_seeds]
    found = _cells(rows)
    known = {(label, frozenset(covered)) for label, covered in found}
    choices: list[Choice] = []
    left_out = {
        _described(label, covered): "no result"
        for label, covered in expected
        if (label, frozenset(covered)) not in known
    }
    for key, by_seed in found.items():
        described = _described(*key)
        without = [seed for seed in needed if seed not in by_seed]
        if without:
            left_out[described] = f"no result for seed {', '.join(map(str, without))}"
            continue
        parts = [by_seed[seed] for seed in needed]
        if any(row["val"] is None for part in parts for row in part):
            left_out[described] = "no validation score"
            continue
        choices.append(_choice(key[1], needed, parts))
    wanted = tasks or tuple(dict.fromkeys(str(row["task"]) for row in rows))
    covered = {task for choice in choices for task in choice.tasks}
    for task in wanted:
        if task not in covered:
            why = [f"{what}: {reason}" for what, reason in left_out.items()]
            raise PlanError(
                f"Nothing can be chosen for '{task}': no method has results for all of the seeds "
                f"{', '.join(map(str, needed))}. {'; '.join(why)}. Run weft compare to the end, or "
                "use fewer seeds: max_seeds."
            )
    return Choices(wanted, tuple(choices), needed, int(rows[0]["base_bytes"]), left_out)


def _described(label: str, tasks: Sequence[str]) -> str:
    return f"{label} for {', '.join(tasks)}"


Key = tuple[str, tuple[str, ...]]
Rows = list[dict[Any, Any]]


def _cells(rows: Rows) -> dict[Key, dict[int, Rows]]:
    """The rows of each cell, by label and tasks, and by seed."""
    cells: dict[str, Rows] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    order = {task: place for place, task in enumerate(dict.fromkeys(r["task"] for r in rows))}
    grouped: dict[Key, dict[int, Rows]] = {}
    for part in cells.values():
        part.sort(key=lambda row: order[row["task"]])
        key = part[0]["label"], tuple(row["task"] for row in part)
        grouped.setdefault(key, {})[int(part[0]["seed"])] = part
    return grouped


def _choice(tasks: tuple[str, ...], seeds: tuple[int, ...], parts: list[Rows]) -> Choice:
    scores = {}
    for i, task in enumerate(tasks):
        rows = [part[i] for part in parts]
        tests = [row["test"] for row in rows]
        scores[task] = Scores(
            metric=rows[0]["metric"],
            sign=1.0 if rows[0]["higher_is_better"] else -1.0,
            val=tuple(float(row["val"]) for row in rows),
            test=() if None in tests else tuple(map(float, tests)),
            own_bytes=tuple(int(row["own_bytes"]) for row in rows),
            head_bytes=tuple(int(row["head_bytes"]) for row in rows),
        )
    first = parts[0][0]
    return Choice(
        label=first["label"],
        method=first["method"],
        options=first["options"],
        train=first["train"],
        seeds=seeds,
        cells=tuple(part[0]["cell"] for part in parts),
        scores=scores,
        shared_bytes=tuple(int(part[0]["shared_bytes"]) for part in parts),
    )
