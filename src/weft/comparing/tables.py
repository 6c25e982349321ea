"""The results of a comparison as one tidy table: a row for each task of each cell."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import MissingExtra

from .files import put

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "task": "string",
    "method": "string",
    "options": "string",
    "train": "string",
    "label": "string",
    "seed": "Int64",
    "cell": "string",
    "joint": "boolean",
    "metric": "string",
    "higher_is_better": "boolean",
    "val": "Float64",
    "test": "Float64",
    "own_parameters": "Int64",
    "own_bytes": "Int64",
    "own_fraction": "Float64",
    "disk_bytes": "Int64",
    "head_parameters": "Int64",
    "head_bytes": "Int64",
    "shared_bytes": "Int64",
    "base_parameters": "Int64",
    "base_bytes": "Int64",
    "seconds": "Float64",
    "epochs": "Int64",
    "best_epoch": "Int64",
    "phase": "string",
    "open_gates": "Int64",
    "gates": "Int64",
    "peak_memory_bytes": "Int64",
    "device_memory_bytes": "Int64",
    "latency_ms_per_row": "Float64",
    "latency_batch": "Int64",
    "device": "string",
    "threads": "Int64",
    "machine": "string",
    "weft": "string",
    "torch": "string",
    "python": "string",
    "finished": "string",
}
"""The columns with their types; ``val_<metric>`` and ``test_<metric>`` follow for every metric."""


def table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of the rows of finished cells.

    Args:
        rows: as the cells' results hold them.

    Returns:
        The columns of `COLUMNS`, then all metrics. Options are JSON with sorted keys.
    """
    import pandas as pd

    flat = [_flat(row) for row in rows]
    metrics = dict.fromkeys(key for row in flat for key in row if key not in COLUMNS)
    types = {**COLUMNS, **dict.fromkeys(metrics, "Float64")}
    return pd.DataFrame(
        {key: pd.array([row.get(key) for row in flat], dtype=types[key]) for key in types}
    )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    scores, main = row["scores"], row["metric"]
    columns = {key: value for key, value in row.items() if key in COLUMNS}
    columns |= {key: json.dumps(row[key], sort_keys=True) for key in ("options", "train")}
    columns |= {split: values.get(main) for split, values in scores.items()}
    for split, values in scores.items():
        columns |= {f"{split}_{metric}": value for metric, value in values.items()}
    return columns


def write_tables(folder: Path, frame: pd.DataFrame) -> list[Path]:
    """Write a table as CSV and, where pyarrow is installed, as Parquet.

    Args:
        folder: where to; ``results.csv`` and ``results.parquet``.
        frame: the table.

    Returns:
        The files that were written.

    Raises:
        TrainingError: a file cannot be written.
    """
    files = [folder / "results.csv"]
    put(files[0], frame.to_csv(index=False).encode())
    if importlib.util.find_spec("pyarrow") is not None:
        files.append(folder / "results.parquet")
        write_parquet(files[1], frame)
    return files


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as Parquet.

    Raises:
        MissingExtra: pyarrow is not installed.
        TrainingError: the file cannot be written.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra("Writing Parquet", "parquet")
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    put(path, content.getvalue())
