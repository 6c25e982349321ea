"""Bundles: one task as files, and back."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.ledger import Ledger, Row, Stored, gate_scores, hardened
from weft.core.model import MultiTaskModel
from weft.core.sharing import Sharing
from weft.core.sites import named_tensors
from weft.core.state import TaskState
from weft.core.structure import SLOT
from weft.core.task import Task
from weft.errors import BankError
from weft.files import write_file

from . import tensors as files_of
from .documents import parse, plain, render
from .files import read_file
from .heads import decode_task, encode_task, fill_head, sized
from .plans import decode_patches, encode_patches, encode_plan
from .shared import SharedState

BUNDLE, OWN, HEAD = "bundle.json", "own.safetensors", "head.safetensors"
_ROW = ("tensor", "site", "kind", "shared", "buffer", "size", "own", "own_bytes", "score")


@dataclass(frozen=True)
class Bundle:
    """One task as it lies on disk.

    Args:
        place: its folder.
        entry: the content of ``bundle.json``.
        own: the task's own tensors by key.
        head: the tensors of its head by name.
    """

    place: Path
    entry: Mapping[str, Any]
    own: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


def write_bundle(
    place: Path,
    model: MultiTaskModel,
    task: str,
    base_fingerprint: str,
    shared: SharedState | None,
    *,
    added: str,
) -> None:
    """Write one task of a model into an empty folder; the model stays as it is.

    Args:
        place: the folder.
        model: the model.
        task: the task's name.
        base_fingerprint: of the base, without the values that the model's plan trains.
        shared: the model's shared state, if it has any.
        added: when the task was first saved.

    Raises:
        BankError: something of the task has no form on disk.
        TaskError: the head is not built yet.
    """
    state, head = model.tasks[task], model.head(task)
    base = dict(named_tensors(model.base))
    patches, own = hardened(base, state.patches, state.own, model.shared)
    heads = {} if head is None else dict(named_tensors(head))
    scores = {**state.scores, **gate_scores(state.patches, state.own)}
    files = {OWN: files_of.to_bytes(own)}
    if head is not None:
        files[HEAD] = files_of.to_bytes(heads)
    is_default = state.sharing is model.sharing
    entry = {
        "task": task,
        "added": added,
        "saved": timestamp(time.time_ns()),
        "versions": _versions(),
        "definition": encode_task(task, state.task, head),
        "output": _output(model),
        "default_plan": is_default,
        "plan": encode_plan(state.sharing),
        **({} if is_default or shared is None else {"model_plan": encode_plan(model.sharing)}),
        "base": {"fingerprint": base_fingerprint},
        "shared": None if shared is None else {"sha256": shared.hash, "bytes": len(shared.data)},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
        "facts": plain(state.facts, f"facts of '{task}'"),
        "patches": encode_patches(patches),
        "own": files_of.table(own),
        "head": files_of.table(heads),
        "scores": scores,
        "ledger": _encode_ledger(model.ledger(task)),
    }
    for name, data in files.items():
        write_file(place / name, data)
    write_file(place / BUNDLE, render("bundle", entry))


def _output(model: MultiTaskModel) -> str | int | bool | None:
    """What heads read; True for a function, which is not stored."""
    output = model.output
    return output if output is None or isinstance(output, (str, int)) else True


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("weft-share", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def timestamp(nanoseconds: int) -> str:
    """A moment that people read and that sorts as text."""
    seconds, rest = divmod(nanoseconds, 10**9)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _encode_ledger(ledger: Ledger) -> dict[str, Any]:
    rows = [[getattr(row, column) for column in _ROW] for row in ledger.rows]
    return {**ledger.to_dict(), "columns": list(_ROW), "rows": rows}


def decode_ledger(entry: Mapping[str, Any]) -> Ledger:
    """The ledger of a bundle."""
    stored = entry["ledger"]
    rows = tuple(Row(**dict(zip(stored["columns"], r, strict=True))) for r in stored["rows"])
    sizes = {name: file["bytes"] for name, file in entry["files"].items()}
    shared = 0 if entry["shared"] is None else entry["shared"]["bytes"]
    return Ledger(
        entry["task"],
        rows,
        stored["head_parameters"],
        stored["head_bytes"],
        stored.get("shared_parameters", 0),
        Stored(sizes[OWN], sizes.get(HEAD, 0), shared),
    )


def read_entry(place: Path, task: str) -> dict[str, Any]:
    """The content of a bundle's document.

    Raises:
        BankError: it is missing or damaged, or belongs to another task.
    """
    path = place / BUNDLE
    entry = parse(path, "bundle", read_file(path))
    if entry.get("task") != task:
        raise BankError(
            f"{path} is the bundle of '{entry.get('task')}', expected '{task}'. Folders carry the "
            "names of their tasks: move it back, or load it and save it under another name."
        )
    return entry


def read_bundle(place: Path, task: str, *, verify: bool) -> Bundle:
    """All of a bundle, checked against what was saved.

    Args:
        place: its folder.
        task: its task's name.
        verify: whether to compare the hashes of its files; sizes and tables are always compared.

    Raises:
        BankError: something is missing, damaged or foreign.
    """
    entry = read_entry(place, task)

    def tensors(name: str, table: Mapping[str, Any]) -> dict[str, Tensor]:
        if name not in entry["files"]:
            return {}
        return files_of.read_tensors(place / name, entry["files"][name], table, verify=verify)

    return Bundle(place, entry, tensors(OWN, entry["own"]), tensors(HEAD, entry["head"]))


def restore(
    bundle: Bundle, sharing: Sharing, *, task: Task | None, head: nn.Module | None
) -> TaskState:
    """The state that a model installs for a bundle, complete unless its head needs a dry run.

    Args:
        bundle: the bundle.
        sharing: the plan that it goes by.
        task: a task of the user's own, handed in.
        head: a head of the user's own, handed in.

    Raises:
        BankError: a part is missing or does not fit.
    """
    entry, name = bundle.entry, bundle.entry["task"]
    described = decode_task(name, entry["definition"], task, head)
    state = TaskState(described, sharing, decode_patches(entry["patches"]), bundle.own)
    if entry["definition"]["head"] is None:
        state.set_head(None)
    if not state.head_is_built:
        make, shapes = state.task.head, files_of.shapes(entry["head"])
        built = sized(make, shapes, foreign=task is not None)
        if built is not None:
            state.set_head(built)
    if state.head is not None:
        fill_head(name, state.head, bundle.head)
    state.scores.update(entry["scores"])
    state.facts.update(entry["facts"])
    return state


def install(model: MultiTaskModel, bundle: Bundle, state: TaskState) -> None:
    """Add a restored task to a model, with a dry run for a head that still needs one.

    Raises:
        BankError: the head cannot be built.
        TaskError: the model has such a task already.
    """
    name = bundle.entry["task"]
    waits = not state.head_is_built
    model.install(name, state)
    if not waits:
        return
    if state.head is None:
        model.remove_task(name)
        raise BankError(
            f"The head of '{name}' is made by a function that needs a batch of features. "
            "Hand in an example: bank.load(base, example=x), or the head itself."
        )
    fill_head(name, state.head, bundle.head)


def check_fit(model: MultiTaskModel, state: TaskState, task: str) -> None:
    """Refuse a task whose tensors do not fit a base that is not its own.

    Raises:
        BankError: names the first tensor that does not fit.
    """
    base = dict(named_tensors(model.base))
    tensors = {**model.shared, **state.own}
    expected = {name: files_of.describe(base[name]) for name in state.patches if name in base}
    found: dict[str, str] = {}
    for name, patch in state.patches.items():
        try:
            with torch.no_grad():
                found[name] = files_of.describe(patch.compose(name, base[name], tensors))
        except (KeyError, RuntimeError) as error:
            found[name] = f"impossible ({error})"
    for site, insertion in state.sharing.adapters.items():
        for name, tensor in named_tensors(insertion.build(model.base.get_submodule(site))):
            key = f"{site}{SLOT}{name}"
            expected[key] = files_of.describe(tensor)
            found[key] = files_of.describe(tensors[key]) if key in tensors else "missing"
    if found != expected:
        raise BankError(
            f"'{task}' does not fit this base: {files_of.first_difference(expected, found)}. "
            "Use the base that it was trained on."
        )
