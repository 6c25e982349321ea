"""The cells of a comparison: what one training decides, and the folder that is named by it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from weft.assembly import Folder
from weft.config import Experiment, MethodSection
from weft.errors import ConfigError

from .config import Comparison, MethodChoice, label
from .files import get_json
from .sources import mark, mark_of_path

RESULT, FAILURE, LOCK, LOG = "result.json", "failure.json", "lock", "log.txt"
CORRECT = "correct.safetensors"
"""By task, which rows of validation are right: of classifications, for paired comparisons."""
LONGEST = 100
"""Characters of a folder's readable part."""


@final
@dataclass(frozen=True)
class Cell:
    """One training: some tasks, a method with its options, a seed.

    Args:
        name: of its folder: readable parts and a hash of everything that decides the result.
        label: the method with its options, as people read it.
        changes: what differs in training for this method.
        joint: whether its tasks are trained together.
        seed: of heads and training.
        experiment: the rest, with only the cell's tasks; its seed is that of splits and base.
        pretrained: the name of the folder of the base that is trained on all of its tasks first;
            "" if they start from the base as it is.
    """

    name: str
    label: str
    changes: Mapping[str, Any]
    joint: bool
    seed: int
    experiment: Experiment
    pretrained: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are trained."""
        return tuple(self.experiment.tasks)

    @property
    def turns(self) -> tuple[tuple[str, ...], ...]:
        """Its tasks as they train: together, or in turn over a base that was trained first."""
        in_turn = self.experiment.pretrain is not None and not self.experiment.train.joint
        return tuple((name,) for name in self.tasks) if in_turn else (self.tasks,)

    @property
    def epochs(self) -> int:
        """All epochs of its training, at most."""
        first = self.experiment.pretrain
        train = len(self.turns) * self.experiment.train.epochs
        return train + (0 if first is None else first.epochs)

    @property
    def folder(self) -> Folder:
        """Where its bank, checkpoint and history are."""
        return Folder(Path(self.experiment.output))

    def file(self, name: str) -> Path:
        """A file of its folder."""
        return self.folder.root / name

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.file(RESULT).is_file()

    def document(self) -> dict[str, Any]:
        """All that it is but its name and place, as plain values."""
        return {
            "label": self.label,
            "changes": dict(self.changes),
            "joint": self.joint,
            "seed": self.seed,
            "pretrained": self.pretrained,
            "experiment": self.experiment.model_dump(mode="json", exclude={"output"}),
        }

    def result(self) -> dict[str, Any] | None:
        """What it gave, or None if it is not finished.

        Raises:
            DataError: the file is damaged.
        """
        found: dict[str, Any] | None = get_json(self.file(RESULT))
        return found


def make_cells(
    comparison: Comparison, trains_shared: Callable[[MethodSection], bool]
) -> list[Cell]:
    """All cells, those of the first seed first.

    Args:
        comparison: the comparison.
        trains_shared: whether a method trains tensors that its tasks share, so that all of its
            tasks are one cell.

    Raises:
        ConfigError: tasks that must train together are asked to train apart.
    """
    marks = _marks(comparison)
    cells = []
    for choice, options in comparison.variants():
        section = MethodSection(name=choice.name, options=options)
        asked = choice.training(comparison.train).joint
        shares = trains_shared(section)
        if shares and choice.pretrain is not None:
            raise ConfigError(
                f"pretrain: '{choice.name}' trains tensors that its tasks share anyway. Leave it "
                "out, and train for more epochs."
            )
        if shares and asked is False:
            raise ConfigError(
                f"train.joint: found false, but '{choice.name}' trains tensors that its tasks "
                "share. Leave it out."
            )
        joint = shares or bool(asked) or choice.pretrain is not None
        names = choice.tasks or tuple(comparison.tasks)
        for tasks in [names] if joint else [(name,) for name in names]:
            for seed in comparison.seeds:
                cells.append(_cell(comparison, choice, section, tasks, joint, seed, marks))
    return sorted(cells, key=lambda cell: comparison.seeds.index(cell.seed))


def _cell(
    comparison: Comparison,
    choice: MethodChoice,
    section: MethodSection,
    tasks: tuple[str, ...],
    joint: bool,
    seed: int,
    marks: Mapping[str, str],
) -> Cell:
    experiment = Experiment(
        base=comparison.base,
        method=section,
        tasks={name: comparison.tasks[name] for name in tasks},
        data=comparison.data,
        train=choice.training(comparison.train),
        pretrain=choice.pretraining(comparison.train),
        seed=comparison.seed,
    )
    described = label(section.name, section.options, choice.changes())
    decided_by = {
        "experiment": experiment.model_dump(mode="json", exclude={"output"}),
        "joint": joint,
        "seed": seed,
        "marks": {key: marks[key] for key in ("base", "weights", *(f"task {t}" for t in tasks))},
        "versions": versions(),
    }
    name = f"{readable(tasks, described, seed)}-{_digest(decided_by)}"
    pretrained = ""
    if experiment.pretrain is not None:
        # Whatever is trained over it later, it is the same base.
        common = experiment.model_dump(mode="json", exclude={"output", "method", "train"})
        first = _digest({**decided_by, "experiment": common})
        pretrained = f"{readable(tasks, 'pretrained', seed)}-{first}"
    root = Path(comparison.output) / "cells" / name
    experiment = experiment.model_copy(update={"output": str(root)})
    return Cell(name, described, choice.changes(), joint, seed, experiment, pretrained)


def _digest(decided_by: Mapping[str, Any]) -> str:
    content = json.dumps(decided_by, sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def readable(tasks: tuple[str, ...], described: str, seed: int) -> str:
    """The part of a folder's name that people read."""
    who = tasks[0] if len(tasks) == 1 else f"{len(tasks)}_tasks"
    text = re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{who}-{described}")
    return f"{text[:LONGEST].strip('._')}-seed{seed}"


def _marks(comparison: Comparison) -> dict[str, str]:
    """What the files are that results depend on."""
    weights = comparison.base.weights
    return {
        "base": mark(comparison.base.name),
        "weights": "" if weights is None else mark_of_path(Path(weights)),
        **{f"task {name}": mark(task.data) for name, task in comparison.tasks.items()},
    }


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    found = {}
    for key, package in {"weft": "weft-share", "torch": "torch"}.items():
        try:
            found[key] = version(package)
        except PackageNotFoundError:
            found[key] = "unknown"
    return found
