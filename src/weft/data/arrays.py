"""Named arrays, in a .npz file or from a function: plain, JPEG-packed or tabular."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.data.images import decode
from weft.data.request import Request, listing
from weft.data.sets import SPLITS, TaskData
from weft.data.splitting import assemble, complete_splits
from weft.data.tables import encode_table
from weft.data.targets import known_labels, read_targets
from weft.data.transforms import fit_square
from weft.errors import DataError

Arrays = Mapping[str, npt.NDArray[Any]]
# Stems that are inputs or notes, so that all others are targets.
_INPUT_STEMS = ("x", "jpg", "x_num", "x_cat")
_NOT_TARGETS = frozenset({*_INPUT_STEMS, "off", "classes", "meta"})


def read_npz(request: Request) -> TaskData:
    """Read a .npz file of named arrays; nothing in it is ever unpickled.

    See ``from_arrays`` for the names and options.

    Args:
        request: what was asked for; the path is the file.

    Returns:
        The data of the task.

    Raises:
        DataError: missing or damaged file, or arrays that do not fit together.
    """
    file = request.existing(folder=False)
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise request.error("found a single array (.npy); expected a .npz of named arrays.")
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise request.error(
            f"cannot be read: {error}. Expected a .npz file without pickled objects; write it "
            "again with numpy.savez and plain arrays."
        ) from error
    return from_arrays(request, arrays)


def from_arrays(request: Request, arrays: Arrays) -> TaskData:
    """Make a task from arrays named ``STEM_train``, ``STEM_val``, ``STEM_test``, or ``STEM`` alone.

    Inputs are ``x``; or ``jpg`` and ``off``, a byte buffer of encoded images and its n+1 offsets;
    or ``x_num`` with ``x_cat``, standardised and one-hot by the training rows. uint8 ``x`` of
    N x H x W or N x H x W x C are images. Options: ``target=STEM`` (else ``y``, else the only other
    stem); ``kind=classes|number``; ``classes=ARRAY``, or ``classes=none`` to number them;
    ``where=STEM:VALUE`` keeps the rows in which that array has that value.

    Args:
        request: what was asked for.
        arrays: the arrays by name.

    Returns:
        The data of the task.

    Raises:
        DataError: arrays are missing or do not fit together; says which names were found.
    """
    names = list(arrays)
    inputs = next(
        ([s] for s in ("x", "jpg") if _suffixes(names, s)),
        [s for s in ("x_num", "x_cat") if _suffixes(names, s)],
    )
    if not inputs:
        raise request.error(
            f"found arrays {listing(names, 20)}; expected inputs named {listing(_INPUT_STEMS)}, "
            "alone or with _train, _val, _test. Rename them, or write a python: function (texts "
            "need a tokenizer)."
        )
    suffixes = _suffixes(names, inputs[0])
    target = _target_stem(request, names, suffixes)
    needed = [*inputs, target, *(["off"] if inputs == ["jpg"] else [])]
    absent = [s + suffix for s in needed for suffix in suffixes if s + suffix not in names]
    if absent:
        raise request.error(
            f"found arrays {listing(names, 20)}, without {listing(absent)}; expected one for each "
            "split. Add them."
        )
    values = _joined(request, arrays, target, suffixes)
    lengths = [len(arrays[target + suffix]) for suffix in suffixes]
    for stem in inputs:
        # n images have n+1 offsets.
        counts = (
            [len(arrays["off" + suffix]) - 1 for suffix in suffixes]
            if stem == "jpg"
            else [len(arrays[stem + suffix]) for suffix in suffixes]
        )
        if counts != lengths:
            raise request.error(
                f"found {counts} rows of {stem} and {lengths} targets {target} "
                f"({listing(s or 'all' for s in suffixes)}); expected one target for each input."
            )
    kept, lengths = _where(request, arrays, suffixes, lengths)
    targets, classes = read_targets(request, values[kept], target)
    if values.dtype.kind not in "US":
        classes = _class_names(request, arrays, target, targets, classes)
    edges = np.cumsum([0, *lengths]).tolist()
    fixed = {
        suffix[1:]: torch.arange(start, stop)
        for suffix, start, stop in zip(suffixes, edges, edges[1:], strict=False)
        if suffix and stop > start
    }
    rows = complete_splits(fixed or None, targets, request)
    if inputs == ["jpg"]:
        x = _unpack(request, arrays, suffixes, kept)
    elif inputs == ["x"]:
        x = _plain(request, _joined(request, arrays, "x", suffixes)[kept])
    else:
        x = _table(request, {s: _joined(request, arrays, s, suffixes)[kept] for s in inputs}, rows)
    if targets.ndim > 2 and x.ndim == 4 and targets.shape[-2:] != x.shape[-2:]:
        raise request.error(
            f"found {tuple(targets.shape[-2:])} targets for {tuple(x.shape[-2:])} images; expected "
            "the same size. Dense targets are not resized: leave out image_size."
        )
    return assemble(request, x, targets, rows, classes)


def _suffixes(names: list[str], stem: str) -> list[str]:
    """The split suffixes that a stem has; [""] where it stands alone."""
    split = [f"_{name}" for name in SPLITS if f"{stem}_{name}" in names]
    return split or ([""] if stem in names else [])


def _target_stem(request: Request, names: list[str], suffixes: list[str]) -> str:
    end = suffixes[0]
    stems = [name.removesuffix(end) for name in names if name.endswith(end)]
    stems = [stem for stem in stems if stem not in _NOT_TARGETS and not stem.endswith("_classes")]
    wanted = request.options.get("target")
    if wanted is not None:
        if wanted not in stems:
            raise request.unknown(f"target={wanted}", wanted, stems)
        return wanted
    if "y" in stems:
        return "y"
    if len(stems) != 1:
        raise request.error(
            f"found {len(stems)} targets: {listing(stems, 20)}; expected one, or one called y. "
            "Add #target=NAME."
        )
    return stems[0]


def _joined(request: Request, arrays: Arrays, stem: str, suffixes: list[str]) -> npt.NDArray[Any]:
    parts = [arrays[stem + suffix] for suffix in suffixes]
    shapes = {part.shape[1:] for part in parts}
    if any(part.ndim == 0 for part in parts) or len(shapes) > 1:
        raise request.error(
            f"arrays of {stem} have shapes {listing([str(p.shape) for p in parts])}; expected rows "
            "first and the same shape in every split."
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _where(
    request: Request, arrays: Arrays, suffixes: list[str], lengths: list[int]
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The row numbers that the option ``where`` keeps, and how many are left of each part."""
    where = request.options.get("where")
    if where is None:
        return np.arange(sum(lengths)), lengths
    stem, _, value = where.rpartition(":")
    if any(stem + suffix not in arrays for suffix in suffixes):
        raise request.unknown(f"where={where}", stem + suffixes[0], list(arrays))
    masks = [arrays[stem + suffix].astype(str) == value for suffix in suffixes]
    if [len(mask) for mask in masks] != lengths or not any(mask.any() for mask in masks):
        found = sorted({str(v) for suffix in suffixes for v in arrays[stem + suffix].tolist()})
        raise request.error(f"no row has where={where}; {stem} holds: {listing(found, 20)}.")
    return np.flatnonzero(np.concatenate(masks)), [int(mask.sum()) for mask in masks]


def _class_names(
    request: Request,
    arrays: Arrays,
    target: str,
    targets: Tensor,
    classes: tuple[str, ...] | None,
) -> tuple[str, ...] | None:
    wanted = request.options.get("classes")
    if wanted is not None and wanted != "none" and wanted not in arrays:
        raise request.unknown(f"classes={wanted}", wanted, ["none", *arrays])
    if classes is None or wanted == "none":
        return classes
    # `classes` names the file's own target; another target may bring its own names.
    by_default = "classes" if request.options.get("target") in (None, "y") else "none"
    own = f"{target}_classes"
    source = wanted or (own if own in arrays else by_default)
    if source not in arrays:
        return classes
    names = tuple(str(name) for name in arrays[source].tolist())
    labels = known_labels(targets)
    if len(labels) and int(labels.max()) >= len(names):
        raise request.error(
            f"{target} holds label {int(labels.max())}, and {source} names {len(names)} classes "
            f"({listing(names, 5)}). Say classes=none to number the classes instead."
        )
    return names


def _unpack(
    request: Request, arrays: Arrays, suffixes: list[str], kept: npt.NDArray[np.int64]
) -> Tensor:
    sources: list[bytes] = []
    names: list[str] = []
    for suffix in suffixes:
        buffer, offsets = arrays["jpg" + suffix], arrays["off" + suffix].astype(np.int64)
        if buffer.dtype != np.uint8 or (np.diff(offsets, prepend=0, append=len(buffer)) < 0).any():
            raise request.error(
                f"off{suffix} must hold rising offsets into the uint8 bytes of jpg{suffix} "
                f"(found {buffer.dtype}, {len(buffer)} long, offsets {offsets[0]}..{offsets[-1]}). "
                "Write n+1 offsets for n images."
            )
        data, edges = buffer.tobytes(), offsets.tolist()
        sources += [data[start:stop] for start, stop in pairwise(edges)]
        names += [f"jpg{suffix}[{place}]" for place in range(len(edges) - 1)]
    return decode(request, [sources[row] for row in kept], [names[row] for row in kept])


def _plain(request: Request, x: npt.NDArray[Any]) -> Tensor:
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise request.error(
            f"x is {x.dtype} of shape {x.shape}; expected numbers of two or more dimensions, rows "
            "first. Texts need a tokenizer: give its indices, or a python: function."
        )
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if x.dtype != np.uint8 or x.ndim == 2:
        return tensor.float() if x.dtype.kind in "bf" or x.dtype == np.uint8 else tensor.long()
    if x.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    size = request.image_size
    return tensor if size is None or tensor.ndim != 4 else fit_square(tensor, size)


def _table(
    request: Request, parts: Mapping[str, npt.NDArray[Any]], rows: Mapping[str, Tensor]
) -> Tensor:
    if "train" not in rows:
        raise request.error("found no training rows; columns are scaled by the training rows.")
    count = len(next(iter(parts.values())))
    numeric = parts.get("x_num", np.zeros((count, 0), np.float32))
    codes = parts.get("x_cat", np.zeros((count, 0), np.int64))
    if numeric.ndim != 2 or codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise request.error(
            f"x_num has shape {numeric.shape} and x_cat {codes.shape} ({codes.dtype}); expected "
            "rows x columns, and whole-number codes."
        )
    return encode_table(
        torch.from_numpy(numeric.astype(np.float32)),
        torch.from_numpy(codes.astype(np.int64)),
        rows["train"],
    )
