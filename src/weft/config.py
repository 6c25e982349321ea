"""The YAML file of `weft train`: its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from .bases import stated_image_size
from .data import without_other_targets
from .schema import Section, read_content, validated
from .tasks import check_options


class BaseSection(Section):
    """The base network.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``python:FILE.py:FUNCTION``.
        weights: a file of weights (safetensors or torch) to load into it.
        options: arguments of the function that makes it.
        output: what heads read if the base returns a structure.
        mean: of each channel of the pixels in 0..1 that the base was trained on.
        std: likewise; mean and std default to what the base's library says, else 0.5.
        channels_last: run in this memory format, which is faster for convolutions on CPUs.
    """

    name: str
    weights: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    output: str | int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels_last: bool = False


class MethodSection(Section):
    """A method and its options.

    Args:
        name: one of ``weft methods``.
        options: the method's options.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class TaskSection(Section):
    """One task.

    Args:
        data: ``imagefolder:DIR``, ``csv:FILE#target=COLUMN``, ``npz:FILE``, ``hf:PATH`` or
            ``python:FILE.py:FUNCTION``.
        kind: classification, binary, regression, segmentation, depth, surface_normals or
            dense_regression.
        classes: how many classes (or labels, targets, channels); default what the data says.
        options: further arguments of the kind, for instance ``{head_init: zero}``.
        method: a plan of its own for this task.
    """

    data: str
    kind: Literal[
        "classification",
        "binary",
        "regression",
        "segmentation",
        "depth",
        "surface_normals",
        "dense_regression",
    ] = "classification"
    classes: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    method: MethodSection | None = None

    @field_validator("options")
    @classmethod
    def _known(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "kind" in info.data:
            check_options(info.data["kind"], value)
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_method(value)


class AugmentationSection(Section):
    """Random changes to training images; see `weft.data.Augmentation`."""

    flip: bool = True
    crop_padding: int = Field(0, ge=0)
    min_area: float = Field(1.0, gt=0, le=1)
    brightness: float = Field(0.0, ge=0)
    contrast: float = Field(0.0, ge=0)


class DataSection(Section):
    """How data is read.

    Args:
        batch_size: rows in a training batch.
        eval_batch_size: rows in a validation or test batch.
        image_size: side that images are resized to; in a file also ``base``, what the base's
            library states for it.
        augmentation: random changes to training images.
        workers: processes that prepare batches.
        val: share of the rows for validation where the data has no such split.
        test: likewise for testing.
    """

    batch_size: int = Field(32, ge=1)
    eval_batch_size: int = Field(256, ge=1)
    image_size: int | None = Field(None, ge=1)
    augmentation: AugmentationSection | None = None
    workers: int = Field(0, ge=0)
    val: float = Field(0.15, ge=0, lt=1)
    test: float = Field(0.15, ge=0, lt=1)


class FitSection(Section):
    """Arguments of `weft.fit` that every training has."""

    epochs: int = Field(30, ge=1)
    lr: float = Field(0.01, gt=0)
    head_lr: float | None = Field(None, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    accumulate: int = Field(1, ge=1)
    one_at_a_time: bool = False
    clip: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(None, ge=1)
    precision: Literal["no", "fp16", "bf16"] = "no"
    trackers: list[str] = Field(default_factory=list)


class PretrainSection(FitSection):
    """How the base is trained on all tasks together before each is trained on its own.

    One task's activations at a time are in memory unless ``one_at_a_time: false``.
    """

    one_at_a_time: bool = True


class TrainSection(FitSection):
    """How tasks are trained.

    Args:
        joint: train all tasks together; default only if the plan trains shared tensors.
    """

    joint: bool | None = None


class Experiment(Section):
    """A whole file.

    Args:
        base: the base network.
        method: the plan of all tasks, a name or ``{name: ..., options: ...}``.
        tasks: by name.
        data: how data is read.
        train: how tasks are trained.
        pretrain: train the base on all tasks together first (efficient joint training).
        output: the folder for bank, checkpoints, history and report.
        seed: of data splits and training.
    """

    base: BaseSection
    method: MethodSection
    tasks: dict[str, TaskSection] = Field(min_length=1)
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    pretrain: PretrainSection | None = None
    output: str = "runs/weft"
    seed: int = Field(0, ge=0)

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_method(value)

    @field_validator("tasks")
    @classmethod
    def _apart(cls, tasks: dict[str, TaskSection]) -> dict[str, TaskSection]:
        return with_own_targets(tasks)


def with_image_size(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a file, with the base's own number where it says ``image_size: base``."""
    match content:
        case {"data": {"image_size": "base"} as data, "base": {"name": str(name)} as base}:
            side = stated_image_size(name, base.get("options"))
            return {**content, "data": {**data, "image_size": side}}
    return content


def with_own_targets(tasks: Mapping[str, TaskSection]) -> dict[str, TaskSection]:
    """The same tasks, none with another's target among its inputs."""
    specs = without_other_targets({name: task.data for name, task in tasks.items()})
    return {n: t.model_copy(update={"data": specs[n]}) for n, t in tasks.items()}


def named_method(value: Any) -> Any:
    """Accept ``taps``, ``{name: taps, penalty: 0.3}`` and ``{name: taps, options: {...}}``."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and isinstance(value.get("options", {}), Mapping):
        named = {k: v for k, v in value.items() if k not in ("name", "options")}
        options = {**value.get("options", {}), **named}
        return {**{k: v for k, v in value.items() if k == "name"}, "options": options}
    return value


def read(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check a file.

    Args:
        path: a YAML file; relative paths in it are seen from where weft is started.
        overrides: ``key.of.value=value`` with the value in YAML, later ones win.

    Raises:
        ConfigError: names the key, the value found and what was expected.
    """
    return check(read_content(path, overrides))


def check(content: Mapping[str, Any]) -> Experiment:
    """Check the content of a file.

    Raises:
        ConfigError: names every wrong key, what was found and what was expected.
    """
    return validated(Experiment, with_image_size(content))
