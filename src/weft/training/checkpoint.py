"""Checkpoints: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.errors import TrainingError

FORMAT = 1
NAME = "checkpoint.pt"


def snapshot(model: MultiTaskModel, tasks: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Copies of all that training can change: own tensors, heads, and trained shared tensors."""
    parts = {f"task:{t}": model.tasks[t].state_dict() for t in tasks}
    if model.sharing.trains_shared:
        parts["shared"] = model.shared.state_dict()
        base = model.base.state_dict()
        parts["base"] = {n: t for n, t in base.items() if n in model.sharing.train_shared}
    return {
        part: {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
        for part, state in parts.items()
    }


def restore(
    model: MultiTaskModel, parts: Mapping[str, Mapping[str, Tensor]], only: str | None = None
) -> None:
    """Put copies back, in place.

    Args:
        model: the model that the snapshot was taken of.
        parts: the snapshot.
        only: a task, to leave everything else as it is.
    """
    for part, state in parts.items():
        kind, _, task = part.partition(":")
        if only is not None and task != only:
            continue
        if kind == "task":
            model.tasks[task].load_state_dict(dict(state))
        elif kind == "shared":
            model.shared.load_state_dict(dict(state))
        else:
            model.base.load_state_dict(dict(state), strict=False)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; a killed write leaves the previous one."""
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{NAME}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path / NAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in a folder, or None if there is none.

    Args:
        path: the folder.
        config: what the run was asked for; a checkpoint of another run is refused.

    Raises:
        TrainingError: the checkpoint is damaged or belongs to another run.
    """
    file = path / NAME
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        known = content["format"] == FORMAT
        was: dict[str, Any] = content["config"]
    except Exception as error:
        raise TrainingError(
            f"The checkpoint {file} cannot be read ({error}). Remove it to start anew."
        ) from error
    if not known:
        raise TrainingError(
            f"The checkpoint {file} has format {content['format']}, this version reads {FORMAT}."
        )
    for key, value in config.items():
        if was.get(key) != value:
            raise TrainingError(
                f"The checkpoint in {path} belongs to another run: {key} was {was.get(key)!r}, "
                f"now {value!r}. Use another folder, or remove the checkpoint to start anew."
            )
    return content
