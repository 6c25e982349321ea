"""The base that an experiment trains on all of its tasks together, before any task owns a part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from .assembly import Folder, load_experiment_base, make_task
from .config import Experiment
from .core.sites import named_tensors
from .data import Loader, Preprocessing, TaskData
from .errors import ConfigError
from .joint import pretrain
from .training import fit
from .training.files import write_whole
from .training.history import Callback

Loaders = Mapping[str, Mapping[str, Loader]]
"""By task and split."""


def trained_base(experiment: Experiment) -> tuple[nn.Module, Preprocessing | None]:
    """The base that an experiment's tasks stand on, and how its pixels are scaled.

    Raises:
        ConfigError: it was to be trained first and has not been, or by another configuration.
    """
    base, stated = load_experiment_base(experiment)
    if experiment.pretrain is not None:
        file = Folder(Path(experiment.output)).base
        if not file.is_file():
            raise ConfigError(f"The base is not trained yet: there is no {file}. Run weft train.")
        _fill(base, file, _pretraining(experiment))
    return base, stated


def pretrained_base(
    experiment: Experiment,
    base: nn.Module,
    sets: Mapping[str, TaskData],
    loaders: Loaders,
    example: Any,
    *,
    progress: bool,
    callbacks: tuple[Callback, ...] = (),
) -> nn.Module:
    """The base trained on all tasks together, from its file if it has been trained already."""
    folder = Folder(Path(experiment.output))
    made_by = _pretraining(experiment)
    if folder.base.is_file():
        _fill(base, folder.base, made_by)
        return base
    assert experiment.pretrain is not None
    training = partial(
        fit,
        **experiment.pretrain.model_dump(),
        seed=experiment.seed,
        checkpoint=folder.base.with_name("checkpoint"),
        log=folder.base.with_name("history.jsonl"),
        callbacks=callbacks,
        progress=progress,
    )
    torch.manual_seed(experiment.seed)
    trained = pretrain(
        base,
        {name: make_task(name, experiment.tasks[name], data) for name, data in sets.items()},
        {name: (splits["train"], splits.get("val")) for name, splits in loaders.items()},
        training=training,
        example=example,
        output=experiment.base.output,
    )
    tensors = {name: t.detach().contiguous() for name, t in named_tensors(trained)}
    write_whole(folder.base, save(tensors, {"experiment": made_by}))
    return trained


def _pretraining(experiment: Experiment) -> str:
    """What decides the weights of a base that is trained first, as text."""
    parts = experiment.model_dump(mode="json", include={"base", "data", "pretrain", "seed"})
    tasks = {n: s.model_dump(mode="json", exclude={"method"}) for n, s in experiment.tasks.items()}
    return json.dumps({**parts, "tasks": tasks}, sort_keys=True)


@torch.no_grad()
def _fill(base: nn.Module, file: Path, made_by: str) -> None:
    """Load a trained base's weights.

    Raises:
        ConfigError: they were trained by another configuration, or are damaged.
    """
    try:
        with safe_open(file, "pt") as stored:
            was = (stored.metadata() or {}).get("experiment")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except Exception as error:  # what a damaged file raises depends on its bytes
        raise ConfigError(f"{file} cannot be read: {error}. Remove it to train anew.") from error
    if was != made_by:
        raise ConfigError(
            f"{file} was trained by another configuration of base, data, tasks, pretrain or seed. "
            "Use another output, or remove it to train anew."
        )
    for name, tensor in named_tensors(base):
        tensor.copy_(tensors[name])
