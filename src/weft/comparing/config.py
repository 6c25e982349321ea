"""The YAML file of `weft compare`: tasks x methods x options x seeds on one base."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from weft.config import (
    BaseSection,
    DataSection,
    PretrainSection,
    TaskSection,
    TrainSection,
    with_image_size,
    with_own_targets,
)
from weft.errors import ConfigError, close_matches
from weft.registry import METHODS, options_of
from weft.schema import Section, read_content, validated

Fit = TypeVar("Fit", TrainSection, PretrainSection, None)


class MethodChoice(Section):
    """A method with options, or several: one for each combination of a grid's values.

    Args:
        name: one of ``weft methods``.
        options: the method's options.
        grid: by option, the values to try.
        train: what differs for it from the file's ``train``.
        tasks: only these tasks; default all.
        pretrain: how the base is trained on all of its tasks together first; default not at all.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    train: TrainSection = TrainSection()
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    pretrain: PretrainSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Accept ``taps`` and ``{name: taps, penalty: 0.3}``."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and isinstance(value.get("options", {}), Mapping):
            keys = cls.model_fields
            named = {key: v for key, v in value.items() if key not in keys}
            options = {**value.get("options", {}), **named}
            return {**{k: v for k, v in value.items() if k in keys}, "options": options}
        return value

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        if name not in METHODS:
            hint = close_matches(name, METHODS)
            raise ValueError(f"expected one of the methods {', '.join(METHODS)}.{hint}")
        return name

    @field_validator("grid")
    @classmethod
    def _filled(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for option, values in grid.items():
            if not values:
                raise ValueError(f"expected at least one value of '{option}'")
        return grid

    @field_validator("train", "pretrain")
    @classmethod
    def _one_process(cls, section: Fit) -> Fit:
        for key in ("precision", "trackers"):
            if section is not None and key in section.model_fields_set:
                raise ValueError(f"'{key}' is one for all methods; say it in the file's train")
        return section

    @model_validator(mode="after")
    def _options_exist(self) -> MethodChoice:
        known = options_of(self.name)
        for option in (*self.options, *self.grid):
            if option not in known:
                raise ValueError(
                    f"'{self.name}' has no option '{option}'; its options: "
                    f"{', '.join(known) or 'none'}.{close_matches(option, known)}"
                )
            if option in self.options and option in self.grid:
                raise ValueError(f"'{option}' is in options and in grid; say it once")
        return self

    def variants(self) -> list[dict[str, Any]]:
        """The options of every combination of the grid's values."""
        values = itertools.product(*self.grid.values())
        return [{**self.options, **dict(zip(self.grid, v, strict=True))} for v in values]

    def changes(self) -> dict[str, Any]:
        """What differs in training for this method, as plain values."""
        changes = self.train.model_dump(exclude_unset=True)
        if self.pretrain is not None:
            changes["pretrain"] = self.pretrain.model_dump(exclude_unset=True)
        return changes

    def training(self, common: TrainSection) -> TrainSection:
        """How it is trained: as the file says, but for what differs."""
        return common.model_copy(update=self.train.model_dump(exclude_unset=True))

    def pretraining(self, common: TrainSection) -> PretrainSection | None:
        """How the base is trained first, in the precision of all training."""
        update = {"precision": common.precision}
        return None if self.pretrain is None else self.pretrain.model_copy(update=update)


class Comparison(Section):
    """A whole file.

    Args:
        base: the base network, one for all.
        tasks: by name.
        methods: what to compare; ``all`` is every registered method with its defaults.
        seeds: of training: a list, or a number n for 0..n-1.
        data: how data is read.
        train: how tasks are trained.
        output: the folder of the fleet.
        seed: of the data's splits and of a base that is drawn at random, one for all cells.
    """

    base: BaseSection
    tasks: dict[str, TaskSection] = Field(min_length=1)
    methods: tuple[MethodChoice, ...]
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    output: str = "runs/comparison"
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _pretrain_belongs_to_methods(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "pretrain" in value:
            raise ValueError(
                "pretrain belongs to a method, so that others start from the base as it is: "
                "methods: [{name: taps, pretrain: {epochs: 20}}]"
            )
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        return tuple(METHODS) if value == "all" else value

    @field_validator("methods")
    @classmethod
    def _some(cls, methods: tuple[MethodChoice, ...]) -> tuple[MethodChoice, ...]:
        if not methods:
            raise ValueError("expected at least one")
        return methods

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return tuple(range(value))
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("expected different whole numbers of at least 0")
        return seeds

    @field_validator("tasks")
    @classmethod
    def _without_plans(cls, tasks: dict[str, TaskSection]) -> dict[str, TaskSection]:
        for name, section in tasks.items():
            if section.method is not None:
                raise ValueError(
                    f"'{name}' has a method of its own; methods are compared, say "
                    "them under methods"
                )
        return with_own_targets(tasks)

    @model_validator(mode="after")
    def _known_and_different(self) -> Comparison:
        for i, choice in enumerate(self.methods):
            for task in choice.tasks or ():
                if task not in self.tasks:
                    hint = close_matches(task, self.tasks)
                    raise ValueError(f"methods.{i}.tasks: there is no task '{task}'.{hint}")
        seen: set[tuple[str, str]] = set()
        for choice, options in self.variants():
            for task in choice.tasks or self.tasks:
                key = (task, label(choice.name, options, choice.changes()))
                if key in seen:
                    raise ValueError(f"methods: '{key[1]}' is there twice for '{task}'")
                seen.add(key)
        return self

    def variants(self) -> list[tuple[MethodChoice, dict[str, Any]]]:
        """Every method with every combination of its options."""
        return [(choice, options) for choice in self.methods for options in choice.variants()]


def label(name: str, options: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """A method with its options as people read it: ``taps penalty=0.3 train.lr=0.01``."""
    first = changes.get("pretrain")
    train = {f"train.{key}": v for key, v in changes.items() if key != "pretrain"}
    pretrain = {f"pretrain.{key}": v for key, v in first.items()} if first else {"pretrain": "yes"}
    parts = {**options, **train, **({} if first is None else pretrain)}
    values = (f"{key}={_short_value(value)}" for key, value in sorted(parts.items()))
    return " ".join([name, *values])


def _short_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_comparison(
    experiment: str | Path | Mapping[str, Any] | Comparison, overrides: Sequence[str] = ()
) -> Comparison:
    """Read and check a comparison.

    Args:
        experiment: a YAML file, its content, or a comparison that is checked already.
        overrides: ``key.of.value=value`` with the value in YAML; only for a file.

    Raises:
        ConfigError: names the key, the value found and what was expected.
    """
    if isinstance(experiment, (str, Path)):
        return validated(Comparison, with_image_size(read_content(experiment, overrides)))
    if overrides:
        raise ConfigError("Overrides belong to a YAML file; change the content itself.")
    if isinstance(experiment, Comparison):
        return experiment
    return validated(Comparison, with_image_size(experiment))
