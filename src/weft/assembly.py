"""The parts of an experiment, each made from its section of the configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .bases import load_base
from .config import Experiment, MethodSection, TaskSection
from .core.model import MultiTaskModel
from .core.sharing import Sharing
from .core.task import Task
from .data import Augmentation, Loader, Preprocessing, TaskData, check, load, loader
from .errors import ConfigError, DataWarning
from .registry import METHODS, method, options_of
from .tasks import task_from_spec

COUNTS = {"binary": "labels", "regression": "targets", "dense_regression": "channels"}
"""The option that ``classes`` of a task's section stands for, by kind."""


@dataclass(frozen=True)
class Folder:
    """Where an experiment keeps its files.

    Args:
        root: the experiment's ``output``.
    """

    root: Path

    @property
    def bank(self) -> Path:
        """The bank."""
        return self.root / "bank"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @property
    def base(self) -> Path:
        """The weights of the base that was trained on all tasks first, where one was asked for."""
        return self.root / "pretraining" / "base.safetensors"

    def checkpoint(self, name: str) -> Path:
        """A run's checkpoint."""
        return self.root / "checkpoints" / name

    def history(self, name: str) -> Path:
        """A run's history as JSON lines."""
        return self.root / "history" / f"{name}.jsonl"


def resolved(experiment: Experiment, name: str) -> dict[str, Any]:
    """What decides a task's result, in plain values.

    Args:
        experiment: the checked configuration.
        name: the task.
    """
    whole = experiment.model_dump(mode="json", exclude={"tasks", "output"})
    task = experiment.tasks[name].model_dump(mode="json")
    return {**whole, "method": task.pop("method") or whole["method"], "task": task}


def load_experiment_base(experiment: Experiment) -> tuple[nn.Module, Preprocessing | None]:
    """The base before any training, and how its pixels are scaled.

    Scaled as the file says, else as the base's library says.
    """
    section = experiment.base
    torch.manual_seed(experiment.seed)  # a base that is drawn at random is the same every time
    base, stated = load_base(section.name, weights=section.weights, options=section.options)
    if section.channels_last:
        # torch's stubs do not know the keyword alone.
        base = base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if section.mean is not None or section.std is not None:
        stated = Preprocessing(mean=section.mean or (0.5,), std=section.std or (0.5,))
    return base, stated


def first_rows(loaders: Mapping[str, Mapping[str, Loader]]) -> Any:
    """One row of the first task's inputs."""
    x, _ = next(iter(next(iter(loaders.values()))["train"]))
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:1], x)


def make_plan(section: MethodSection, base: nn.Module, example: Any) -> Sharing:
    """The plan of a section; methods that look at an example get one."""
    options = dict(section.options)
    if example is not None and needs_example(section):
        options["example"] = example
    return method(section.name, base, **options)


def needs_example(section: MethodSection) -> bool:
    """Whether the method runs the base on an example to make its plan."""
    return section.name in METHODS and "example" in options_of(section.name)


def read_data(experiment: Experiment) -> dict[str, TaskData]:
    """The data of all tasks, checked.

    Raises:
        DataError: data that cannot be trained on.
    """
    return {name: read_task(experiment, name) for name in experiment.tasks}


def read_task(experiment: Experiment, name: str) -> TaskData:
    """The data of one task."""
    section = experiment.data
    return load(
        experiment.tasks[name].data,
        seed=experiment.seed,
        val=section.val,
        test=section.test,
        image_size=section.image_size,
    )


def warn_of_data(experiment: Experiment, sets: Mapping[str, TaskData]) -> None:
    """Warn of what would make training or its scores worthless; every sample is read once.

    Args:
        experiment: whose tasks these are.
        sets: by task, its data. Tasks with one source are looked at once.
    """
    seen: set[str] = set()
    for name, data in sets.items():
        source = experiment.tasks[name].data
        if source not in seen:
            seen.add(source)
            for problem in check(data):
                warnings.warn(f"Task '{name}': {problem}", DataWarning, stacklevel=2)


def make_loaders(
    experiment: Experiment, name: str, data: TaskData, stated: Preprocessing | None
) -> dict[str, Loader]:
    """A loader for each split that a task has.

    Raises:
        ConfigError: an augmentation that the task's targets do not go with.
    """
    section, task = experiment.data, experiment.tasks[name]
    images = data.input_shape is not None and len(data.input_shape) == 3
    preprocessing = (stated or Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)) if images else None
    augmentation = None
    if section.augmentation is not None and images:
        normals = task.kind == "surface_normals"
        if normals and section.augmentation.flip and task.options.get("encoding") == "adashare":
            raise ConfigError(
                "data.augmentation.flip: found true, but mirrored normals have no value in the "
                f"encoding 'adashare' of tasks.{name}. Set it to false."
            )
        augmentation = Augmentation(**section.augmentation.model_dump(), normals=normals)
    return {
        split: loader(
            dataset,
            section.batch_size if split == "train" else section.eval_batch_size,
            train=split == "train",
            augmentation=augmentation if split == "train" else None,
            preprocessing=preprocessing,
            workers=section.workers,
        )
        for split, dataset in data.splits.items()
    }


def make_model(
    experiment: Experiment,
    base: nn.Module,
    sets: Mapping[str, TaskData],
    example: Any,
) -> MultiTaskModel:
    """A model with the tasks of ``sets``, heads sized by the example."""
    sharing = make_plan(experiment.method, base, example)
    model = MultiTaskModel(base, sharing, example=example, output=experiment.base.output)
    for name, data in sets.items():
        section = experiment.tasks[name]
        own = section.method
        plan = None if own is None else make_plan(own, base, example)
        torch.manual_seed(experiment.seed)  # a task's head does not depend on the tasks before it
        model.add_task(name, make_task(name, section, data), sharing=plan)
    return model


def make_task(name: str, section: TaskSection, data: TaskData) -> Task:
    """The task that a section describes, with the classes of its data.

    Raises:
        ConfigError: the number of classes is neither stated nor in the data, or they disagree.
    """
    spec: dict[str, Any] = {"kind": section.kind, **section.options}
    if section.kind in ("classification", "segmentation"):
        if section.classes is None and data.classes is None:
            raise ConfigError(f"tasks.{name}.classes: missing, and the data does not name them.")
        if data.classes is not None and section.classes not in (None, len(data.classes)):
            raise ConfigError(
                f"tasks.{name}.classes: found {section.classes}, the data has {len(data.classes)}."
            )
        spec["classes"] = section.classes if data.classes is None else list(data.classes)
    elif section.classes is not None:
        if section.kind not in COUNTS:
            raise ConfigError(f"tasks.{name}.classes: '{section.kind}' has none. Leave it out.")
        spec[COUNTS[section.kind]] = section.classes
    return task_from_spec(spec)
