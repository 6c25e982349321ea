"""From a data spec to the data of one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from weft.data.arrays import read_npz
from weft.data.functions import read_function
from weft.data.hub import read_hub
from weft.data.images import read_imagefolder
from weft.data.request import Request, split_spec
from weft.data.sets import TaskData
from weft.data.tables import read_csv, read_parquet
from weft.errors import DataError, close_matches


@final
@dataclass(frozen=True)
class Reader:
    """How one kind of spec is read.

    Args:
        read: turns a request into data.
        options: the options it knows, after ``#``.
        form: how such a spec is written.
    """

    read: Callable[[Request], TaskData]
    options: tuple[str, ...]
    form: str


_TABLE_OPTIONS = ("target", "kind", "split", "drop")
_ARRAY_OPTIONS = ("target", "kind", "classes", "where")

READERS: dict[str, Reader] = {
    "imagefolder": Reader(read_imagefolder, (), "imagefolder:DIR"),
    "csv": Reader(read_csv, _TABLE_OPTIONS, "csv:FILE#target=COLUMN"),
    "parquet": Reader(read_parquet, _TABLE_OPTIONS, "parquet:FILE#target=COLUMN"),
    "npz": Reader(read_npz, _ARRAY_OPTIONS, "npz:FILE"),
    "hf": Reader(read_hub, ("target", "input", "config", "kind"), "hf:PATH_OR_NAME"),
    "python": Reader(read_function, _ARRAY_OPTIONS, "python:FILE.py:FUNCTION"),
}


def load(
    spec: str,
    *,
    seed: int = 0,
    val: float = 0.15,
    test: float = 0.15,
    image_size: int | None = None,
) -> TaskData:
    """Read the data of one task.

    Splits that the data fixes are kept. Where it fixes none, rows are split by class with the
    stated seed; where only validation is missing, it is taken out of the training rows.

    Args:
        spec: ``imagefolder:DIR``, ``csv:FILE#target=COLUMN``, ``parquet:FILE#target=COLUMN``,
            ``npz:FILE``, ``hf:PATH_OR_NAME`` or ``python:FILE.py:FUNCTION``, with
            ``#option=value&option=value`` where a reader has options.
        seed: seed of the split.
        val: share of the samples for validation, 0 <= val < 1.
        test: share of the samples for the test split, 0 <= test < 1 - val.
        image_size: side of the square that images are resized to once, when they are read; None
            keeps their size.

    Returns:
        The splits, class names and input shape.

    Raises:
        DataError: the spec or its data cannot be used; says what was found and expected.
        MissingExtra: the reader needs an extra that is not installed.
    """
    prefix, colon, rest = spec.partition(":")
    forms = ", ".join(reader.form for reader in READERS.values())
    if not colon or not rest:
        raise DataError(f"Found the data spec {spec!r}; expected one of: {forms}.")
    if prefix not in READERS:
        raise DataError(
            f"Found the data spec {spec!r} with the unknown prefix {prefix!r}; expected one of: "
            f"{forms}.{close_matches(prefix, READERS)}"
        )
    if image_size is not None and image_size < 1:
        raise DataError(f"{spec}: found image_size={image_size}; expected at least 1, or None.")
    if val < 0 or test < 0 or val + test >= 1:
        raise DataError(
            f"{spec}: found shares val={val}, test={test}; expected both >= 0 and a sum below 1."
        )
    reader = READERS[prefix]
    path, options = split_spec(rest)
    request = Request(spec, path, options, seed, val, test, image_size)
    for name in options:
        if name not in reader.options:
            raise request.unknown(f"option {name}", name, reader.options)
    data = reader.read(request)
    wanted = (image_size, image_size)
    if image_size is not None and (data.input_shape is None or data.input_shape[-2:] != wanted):
        raise request.error(
            f"image_size={image_size} has no effect on inputs of shape {data.input_shape}; "
            "expected images that are resized here. Leave it out, or resize batches with "
            "Preprocessing(image_size=...)."
        )
    return data


def without_other_targets(specs: Mapping[str, str]) -> dict[str, str]:
    """Specs in which no task has another task's target as an input.

    Tasks may read one table with a target column each. The targets of the others are dropped, so
    that none of them sees an answer, and all have the same inputs.

    Args:
        specs: by task.

    Returns:
        The same, with ``drop=`` where several tasks read one table.
    """
    parts = {task: _taken_apart(spec) for task, spec in specs.items()}
    targets: dict[tuple[str, str], list[str]] = {}
    for prefix, path, options in parts.values():
        if prefix in ("csv", "parquet") and "target" in options:
            targets.setdefault((prefix, path), []).append(options["target"])
    found = dict(specs)
    for task, (prefix, path, options) in parts.items():
        others = {t for t in targets.get((prefix, path), ()) if t != options.get("target")}
        dropped = [name for name in options.get("drop", "").split(",") if name]
        more = sorted(others - set(dropped))
        if more:
            changed = {**options, "drop": ",".join([*dropped, *more])}
            joined = "&".join(f"{name}={value}" for name, value in changed.items())
            found[task] = f"{prefix}:{path}#{joined}"
    return found


def _taken_apart(spec: str) -> tuple[str, str, dict[str, str]]:
    prefix, _, rest = spec.partition(":")
    return prefix, *split_spec(rest)
