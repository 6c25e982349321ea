"""Data sets of the Hugging Face hub, or saved by its library."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.data.images import SPLIT_FOLDERS, decode
from weft.data.request import Request, listing
from weft.data.sets import Inputs, TaskData
from weft.data.splitting import assemble, complete_splits
from weft.data.targets import read_targets
from weft.errors import MissingExtra

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_TARGETS = ("label", "labels", "target", "y")


def read_hub(request: Request) -> TaskData:
    """Read a data set saved with ``save_to_disk``, or load one from the hub.

    Inputs are the column of images; or ``input_ids`` with its companions, padded to the longest
    row; or all columns of numbers. Options: ``target=COLUMN`` (else label, labels, target or y);
    ``input=COLUMN``; ``config=NAME`` for hub data sets; ``kind=classes|number``.

    Args:
        request: what was asked for; the path is a folder or a name on the hub.

    Returns:
        The data of the task.

    Raises:
        MissingExtra: the datasets library is not installed.
        DataError: columns are missing or hold what no network takes.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtra("Reading Hugging Face data sets", "hf") from error
    local = request.file
    try:
        found = (
            datasets.load_from_disk(str(local))
            if local.exists()
            else datasets.load_dataset(request.path, request.options.get("config"))
        )
    except Exception as error:  # network, cache and hub each have their own types
        place = (
            f"the folder {local} cannot be read"
            if local.exists()
            else f"there is no folder {local}, and the hub data set of that name cannot be loaded"
        )
        raise request.error(
            f"{place}: {type(error).__name__}: {error}. Give a folder written by save_to_disk, or "
            "a data set that this machine can reach."
        ) from error
    parts = _splits(
        request, dict(found) if isinstance(found, datasets.DatasetDict) else None, found
    )
    first = next(iter(parts.values()))
    target = _target_column(request, first.column_names)
    values = np.concatenate([_array(request, part[target], target) for part in parts.values()])
    targets, classes = read_targets(request, values, target)
    feature = first.features[target]
    if isinstance(feature, datasets.ClassLabel) and classes is not None:
        classes = tuple(feature.names)
    edges = np.cumsum([0, *(len(part) for part in parts.values())]).tolist()
    fixed = {
        name: torch.arange(start, stop)
        for name, start, stop in zip(parts, edges, edges[1:], strict=False)
        if name != "all"
    }
    rows = complete_splits(fixed or None, targets, request)
    inputs = _inputs(request, datasets, list(parts.values()), target)
    return assemble(request, inputs, targets, rows, classes)


def _splits(request: Request, named: dict[str, Any] | None, found: Any) -> dict[str, Any]:
    if named is None:
        return {"all": found}
    parts = {SPLIT_FOLDERS[name]: part for name, part in named.items() if name in SPLIT_FOLDERS}
    if not parts:
        raise request.error(
            f"found splits {listing(named)}; expected one of {listing(SPLIT_FOLDERS)}. Rename "
            "them, or write a python: function."
        )
    # A data set that comes as "train" alone fixes nothing: test rows are split off as well.
    return {"all": parts["train"]} if set(parts) == {"train"} else parts


def _target_column(request: Request, columns: Sequence[str]) -> str:
    wanted = request.options.get("target")
    if wanted is not None:
        if wanted not in columns:
            raise request.unknown(f"target={wanted}", wanted, columns)
        return wanted
    present = [name for name in _TARGETS if name in columns]
    if not present:
        raise request.error(
            f"found columns {listing(columns)}; expected a target called {listing(_TARGETS)}. Add "
            "#target=COLUMN."
        )
    return present[0]


def _array(request: Request, column: Any, name: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(list(column))
    except ValueError as error:
        raise request.error(f"column {name} has rows of several lengths: {error}.") from error
    if array.dtype == object:
        raise request.error(
            f"column {name} holds {type(array.flat[0]).__name__} or missing values; expected "
            "numbers or texts. Choose another column or clean it."
        )
    return array


def _inputs(request: Request, datasets: Any, parts: list[Any], target: str) -> Inputs:
    features = parts[0].features
    columns = [name for name in parts[0].column_names if name != target]
    wanted = request.options.get("input")
    if wanted is not None:
        if wanted not in columns:
            raise request.unknown(f"input={wanted}", wanted, columns)
        columns = [wanted]
    images = [name for name in columns if isinstance(features[name], datasets.Image)]
    if len(images) > 1:
        raise request.error(f"found image columns {listing(images)}; add input=COLUMN for one.")
    if images:
        return _images(request, datasets, parts, images[0])
    if "input_ids" in columns:
        return _tokens(parts, [name for name in TOKENS if name in columns])
    numeric = [
        name
        for name in columns
        if isinstance(features[name], datasets.Value)
        and features[name].dtype.startswith(("int", "uint", "float", "bool"))
    ]
    if not numeric or (wanted is None and len(numeric) < len(columns)):
        others = [name for name in columns if name not in numeric]
        raise request.error(
            f"found columns {listing(others)} that are neither images nor single numbers; expected "
            "an image column, input_ids, or numbers. Tokenize texts with "
            "dataset.map(tokenizer) and save_to_disk, name one column with input=, or write a "
            "python: function."
        )
    table = [
        np.stack([_array(request, part[name], name) for name in numeric], axis=1) for part in parts
    ]
    return torch.from_numpy(np.concatenate(table).astype(np.float32))


def _images(request: Request, datasets: Any, parts: list[Any], column: str) -> Tensor:
    sources: list[bytes | Path] = []
    names: list[str] = []
    for part in parts:
        # Encoded bytes decode on all cores, and at reduced size, in our own reader.
        for row, cell in enumerate(part.cast_column(column, datasets.Image(decode=False))[column]):
            encoded, path = cell["bytes"], cell["path"]
            sources.append(Path(path) if encoded is None else encoded)
            names.append(f"{column}[{row}]" if path is None else str(path))
    return decode(request, sources, names)


def _tokens(parts: list[Any], columns: list[str]) -> dict[str, Tensor]:
    """Token columns padded with 0; the mask is made where the data has none."""
    lists = {name: [row for part in parts for row in part[name]] for name in columns}
    lengths = [len(row) for row in lists["input_ids"]]
    lists.setdefault("attention_mask", [[1] * length for length in lengths])
    padded = {name: np.zeros((len(lengths), max(lengths, default=0)), np.int64) for name in lists}
    for name, rows in lists.items():
        for place, row in enumerate(rows):
            padded[name][place, : len(row)] = row
    return {name: torch.from_numpy(array) for name, array in padded.items()}
