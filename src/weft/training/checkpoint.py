"""Checkpoints: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.core.memory import bytes_of
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.core.state import unescape
from weft.errors import TrainingError

from .files import write_whole

MAGIC = b"weft checkpoint 2\n"
NAME = "checkpoint.pt"
DIGEST = hashlib.sha256().digest_size

Parts = dict[str, dict[str, Tensor]]
"""Copies of all that a run can change: for each task, and of what tasks train together."""

SHARED = "shared"


def part_of(task: str) -> str:
    """The name of the part that holds a task."""
    return f"task:{task}"


def tasks_of(parts: Parts) -> list[str]:
    """The tasks that have a part."""
    return [part.removeprefix("task:") for part in parts if part != SHARED]


def changing(model: MultiTaskModel, tasks: tuple[str, ...]) -> Parts:
    """All tensors that fitting these tasks can change, themselves, by part and name."""
    parts = {part_of(task): dict(named_tensors(model.tasks[task])) for task in tasks}
    if any(model.plan(task) is model.sharing for task in tasks) and model.sharing.trains_shared:
        names = model.sharing.train_shared
        base = {f"base.{n}": t for n, t in named_tensors(model.base) if n in names}
        parts[SHARED] = {**base, **dict(named_tensors(model.shared))}
    return parts


def snapshot(model: MultiTaskModel, tasks: tuple[str, ...]) -> Parts:
    """Copies of all that fitting these tasks can change."""
    return {
        part: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        for part, tensors in changing(model, tasks).items()
    }


@torch.no_grad()
def restore(model: MultiTaskModel, tasks: tuple[str, ...], copies: Parts) -> None:
    """Put copies back, in place.

    Args:
        model: the model that the snapshot was taken of.
        tasks: the tasks of the snapshot.
        copies: all or some parts of the snapshot.

    Raises:
        TrainingError: they are of other tensors; nothing has changed then.
    """
    parts = changing(model, tasks)
    for part, tensors in copies.items():
        was = {name: tensor.shape for name, tensor in tensors.items()}
        now = {name: tensor.shape for name, tensor in parts.get(part, {}).items()}
        if was != now:
            name = next(n for n in [*was, *now] if was.get(n) != now.get(n))
            raise TrainingError(
                f"The checkpoint does not fit this model: '{name}' of {part} was "
                f"{_shape(was.get(name))}, now {_shape(now.get(name))}. A model that was fitted to "
                "the end has final gates and cannot go on; make it anew, or remove the checkpoint."
            )
    for part, tensors in copies.items():
        for name, tensor in tensors.items():
            parts[part][name].copy_(tensor)


@torch.no_grad()
def put_back(
    model: MultiTaskModel, tasks: tuple[str, ...], copies: Parts, freeze: Callable[[str], bool]
) -> list[Tensor]:
    """Put back all of a snapshot but what is frozen, for a phase that starts again.

    Args:
        model: the model that the snapshot was taken of.
        tasks: the tasks of the snapshot to put back, and what they train together.
        copies: the snapshot.
        freeze: whether the own or shared tensor of a key stays as it is.

    Returns:
        The tensors that were put back.
    """
    changed = []
    for part, tensors in changing(model, tasks).items():
        for name, tensor in tensors.items():
            key = _key(part, name)
            if key is None or not freeze(key):
                tensor.copy_(copies[part][name])
                changed.append(tensor)
    return changed


def _key(part: str, name: str) -> str | None:
    """The key of an own or shared tensor of a snapshot; None for one of a head."""
    if part == SHARED:
        return name.removeprefix("base.") if name.startswith("base.") else unescape(name)
    return unescape(name.removeprefix("own.")) if name.startswith("own.") else None


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def fingerprint(model: MultiTaskModel) -> str:
    """A short name for the values of the base's tensors that do not train."""
    total = 0
    for name, tensor in named_tensors(model.base):
        if name not in model.sharing.train_shared:
            total = zlib.crc32(bytes_of(tensor), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; a killed write leaves the previous one.

    Raises:
        TrainingError: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    data = buffer.getvalue()
    write_whole(folder / NAME, MAGIC + hashlib.sha256(data).digest() + data)


def load(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in a folder, or None if there is none.

    Args:
        folder: the folder.
        config: what the run was asked for; a checkpoint of another run is refused.

    Returns:
        What was saved.

    Raises:
        TrainingError: the checkpoint is damaged or belongs to another run.
    """
    file = folder / NAME
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrainingError(f"The checkpoint {file} cannot be read: {error}.") from error
    if not data.startswith(MAGIC):
        raise TrainingError(
            f"{file} is no checkpoint of this version of weft. Use another folder, or remove it to "
            "start anew."
        )
    digest, body = data[len(MAGIC) :][:DIGEST], data[len(MAGIC) + DIGEST :]
    if hashlib.sha256(body).digest() != digest:
        raise TrainingError(
            f"The checkpoint {file} is damaged: its {len(body)} bytes are not those that were "
            "written. Remove it to start anew."
        )
    content: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    was: dict[str, Any] = content["config"]
    for key in {**was, **config}:
        if was.get(key) != config.get(key):
            raise TrainingError(
                f"The checkpoint in {folder} belongs to another run: {key} was {was.get(key)!r}, "
                f"now {config.get(key)!r}. Use another folder, or remove it to start anew."
            )
    return content
