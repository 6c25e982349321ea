"""Tables: numbers standardised, categories one-hot, both by the training rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.data.images import SPLIT_FOLDERS, rows_by_name
from weft.data.request import Request, listing
from weft.data.sets import TaskData
from weft.data.splitting import assemble, complete_splits
from weft.data.targets import KINDS, read_targets
from weft.errors import MissingExtra

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
# A column of more values than this is an identifier or free text, not a category.
MOST_CATEGORIES = 1000
# Whole numbers of at most this many distinct values are read as classes.
MOST_INTEGER_CLASSES = 20


def encode_table(numeric: Tensor, codes: Tensor, train: Tensor) -> Tensor:
    """Encode rows with what the training rows alone say.

    Args:
        numeric: N x F numbers; NaN means missing and becomes the training mean, that is 0.
        codes: N x G category codes; each category of the training rows gets a column, and a
            category that training has never seen is all zeros.
        train: the training rows.

    Returns:
        N x (F + categories) features, float32.
    """
    known = numeric[train].double()
    count = (~known.isnan()).sum(0).clamp(min=1)
    mean = known.nansum(0) / count
    deviation = (((known - mean) ** 2).nansum(0) / count).sqrt()
    # A constant column carries nothing; dividing by 1 keeps it finite.
    deviation[deviation == 0] = 1.0
    blocks = [
        ((numeric.double() - mean) / deviation)
        .nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        .float()
    ]
    for column in codes.unbind(1):
        blocks.append((column[:, None] == torch.unique(column[train])[None, :]).float())
    return torch.cat(blocks, dim=1)


def read_csv(request: Request) -> TaskData:
    """Read a table with a header line; the delimiter is the commonest of ``, ; tab`` in it.

    Args:
        request: what was asked for, with the options of `read_table`; the path is the file.

    Returns:
        The data of the task, inputs N x F float32.

    Raises:
        DataError: missing file, columns or targets; ragged rows; columns that are no categories.
    """
    return read_table(request, *_read_cells(request, request.existing(folder=False)))


def read_parquet(request: Request) -> TaskData:
    """Read a Parquet file as the table that it would be as CSV.

    Args:
        request: what was asked for, with the options of `read_table`; the path is the file.

    Returns:
        The data of the task, inputs N x F float32.

    Raises:
        DataError: missing file, columns or targets; columns that are no categories.
        MissingExtra: pyarrow is not installed.
    """
    file = request.existing(folder=False)
    try:
        from pyarrow import ArrowException, types
        from pyarrow import parquet as reader
    except ImportError:
        raise MissingExtra("Reading Parquet", "parquet") from None
    try:
        found = reader.read_table(file)
    except (ArrowException, OSError) as error:
        raise request.error(f"not a Parquet file: {error}.") from error
    for field in found.schema:
        if types.is_nested(field.type) or types.is_binary(field.type):
            raise request.error(
                f"column {field.name} holds {field.type}; expected numbers or texts. Write the "
                "file without it, or with a column for each part."
            )
    if not found.num_rows:
        raise request.error("found no rows; expected at least one.")
    cells = [["" if v is None else str(v) for v in column.to_pylist()] for column in found.columns]
    return read_table(request, list(found.column_names), np.array(cells, dtype=np.str_).T)


def read_table(request: Request, header: Sequence[str], cells: npt.NDArray[np.str_]) -> TaskData:
    """The data of a task in a table.

    Options: ``target=COLUMN`` (required); ``kind=classes|number``; ``split=COLUMN`` whose values
    are train, val and test; ``drop=A,B`` columns to leave out. A column whose values are all
    numbers or missing is standardised, any other is one-hot. A target of texts, or of whole
    numbers with at most 20 distinct values, is a class; other numbers are a regression target.

    Args:
        request: what was asked for.
        header: names of the columns.
        cells: N x columns texts.

    Returns:
        The data of the task, inputs N x F float32.

    Raises:
        DataError: missing columns or targets; columns that are no categories.
    """
    columns = {name: cells[:, place] for place, name in enumerate(header)}
    target = request.options.get("target")
    if target is None:
        raise request.error(
            f"the target column is not named. Add #target=COLUMN, one of: {listing(header, 30)}."
        )
    dropped = [name for name in request.options.get("drop", "").split(",") if name]
    split = request.options.get("split")
    for option, name in [("target", target), *(("drop", d) for d in dropped)]:
        if name not in columns:
            raise request.unknown(f"{option}={name}", name, header)
    if split is not None and split not in columns:
        raise request.unknown(f"split={split}", split, header)
    targets, classes = _read_target(request, columns[target], target)
    fixed = None if split is None else rows_by_name(_read_splits(request, columns[split]))
    rows = complete_splits(fixed, targets, request)
    if "train" not in rows:
        raise request.error("found no training row; columns are scaled by the training rows.")
    numeric, codes = [], []
    for name, column in columns.items():
        if name in {target, split, *dropped}:
            continue
        numbers = _numbers(column)
        if numbers is not None:
            numeric.append(numbers)
            continue
        categories, inverse = np.unique(column, return_inverse=True)
        if len(categories) > MOST_CATEGORIES:
            raise request.error(
                f"column {name} holds {len(categories)} different texts; expected at most "
                f"{MOST_CATEGORIES} categories. Leave it out with drop={name}."
            )
        codes.append(inverse)
    if not numeric and not codes:
        raise request.error(f"found no input column beside the target {target}; expected one.")
    inputs = encode_table(_stack(numeric, len(cells)), _stack(codes, len(cells)), rows["train"])
    return assemble(request, inputs, targets, rows, classes)


def _stack(columns: Sequence[npt.NDArray[np.generic]], rows: int) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(rows, 0)


def _read_cells(request: Request, file: Path) -> tuple[list[str], npt.NDArray[np.str_]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            first = opened.readline()
            opened.seek(0)
            reader = csv.reader(opened, delimiter=max(",;\t", key=first.count))
            lines = [[cell.strip() for cell in line] for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise request.error(f"not a UTF-8 table: {error}. Export it as UTF-8 CSV.") from error
    if len(lines) < 2:
        raise request.error(f"found {len(lines)} lines; expected a header and rows below it.")
    header, rows = lines[0], lines[1:]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise request.error(f"column names occur twice: {listing(doubled)}. Rename them.")
    ragged = [number for number, row in enumerate(rows, 1) if len(row) != len(header)]
    if ragged:
        raise request.error(
            f"{len(ragged)} of {len(rows)} rows do not have the {len(header)} cells of the header "
            f"(rows {listing(map(str, ragged), 5)}; the first has {len(rows[ragged[0] - 1])}). "
            "Quote cells that hold the delimiter."
        )
    return header, np.array(rows, dtype=np.str_)


def _numbers(column: npt.NDArray[np.str_]) -> npt.NDArray[np.float64] | None:
    """The column as numbers with NaN for missing cells, or None where it holds other texts."""
    lacking = np.isin(np.char.lower(column), list(MISSING))
    if lacking.all():
        return np.zeros(len(column))
    numbers = np.full(len(column), np.nan)
    try:
        numbers[~lacking] = column[~lacking].astype(np.float64)
    except ValueError:
        return None
    return numbers


def _read_target(
    request: Request, column: npt.NDArray[np.str_], name: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    kind = request.choice("kind", KINDS)
    numbers = _numbers(column)
    lacking = (column == "") if numbers is None or kind == "classes" else np.isnan(numbers)
    if lacking.any():
        places = [str(row + 1) for row in np.flatnonzero(lacking)]
        raise request.error(
            f"{len(places)} of {len(column)} rows have no target {name} (rows "
            f"{listing(places, 5)}). Remove or fill them."
        )
    if numbers is None:
        return read_targets(request, column, name)
    distinct = np.unique(numbers)
    whole = np.array_equal(distinct, np.round(distinct))
    if kind == "number" or (kind is None and not (whole and len(distinct) <= MOST_INTEGER_CLASSES)):
        return torch.from_numpy(numbers.astype(np.float32)), None
    # The texts name the classes; sorting by value keeps "10" behind "9".
    codes = np.searchsorted(distinct, numbers)
    names = {int(code): str(text) for code, text in zip(codes, column, strict=True)}
    return torch.from_numpy(codes.astype(np.int64)), tuple(names[i] for i in range(len(distinct)))


def _read_splits(request: Request, column: npt.NDArray[np.str_]) -> list[str]:
    strange = sorted(set(np.char.lower(column).tolist()) - set(SPLIT_FOLDERS))
    if strange:
        raise request.unknown(f"split {strange[0]!r}", strange[0], SPLIT_FOLDERS)
    return [SPLIT_FOLDERS[str(value)] for value in np.char.lower(column)]
