"""A comparison as a fleet of cells in one folder: what is there, what is missing, running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from weft.assembly import (
    first_rows,
    load_experiment_base,
    make_loaders,
    make_plan,
    needs_example,
    read_task,
    warn_of_data,
)
from weft.config import Experiment, MethodSection
from weft.dry_run import PlannedTask, dry_run
from weft.errors import ConfigError, DataError, WeftError
from weft.registry import METHODS, Law
from weft.schema import validated

from .attempts import Outcome
from .cells import Cell, make_cells
from .config import Comparison, read_comparison
from .files import get_json, put_json
from .progress import Display, Estimate
from .spreading import check_devices, run_here, run_spread
from .tables import table, write_tables

if TYPE_CHECKING:
    import pandas as pd

DOCUMENT = "comparison.json"


@final
@dataclass(frozen=True)
class Fleet:
    """A comparison with its cells.

    Args:
        comparison: what is compared.
        cells: all of them.
    """

    comparison: Comparison
    cells: tuple[Cell, ...]

    @property
    def root(self) -> Path:
        """Its folder."""
        return Path(self.comparison.output)

    def table(self) -> pd.DataFrame:
        """The rows of all cells that are finished."""
        results = [cell.result() for cell in self.cells]
        return table(row for result in results if result is not None for row in result["rows"])


@final
@dataclass(frozen=True)
class FleetResult:
    """How a run of a fleet ended.

    Args:
        table: of all finished cells of the fleet, those of other runs and shards included.
        failed: by cell's name, why it failed.
        elsewhere: names of the cells that other processes are running.
        waiting: how many cells of the fleet are not finished.
        files: the tables that were written.
    """

    table: pd.DataFrame
    failed: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    waiting: int = 0
    files: tuple[Path, ...] = ()


def make_fleet(comparison: Comparison) -> Fleet:
    """The cells of a comparison; the base and, where a method looks at it, an example are read.

    Raises:
        ConfigError: a base, a method or an option that does not exist.
        DataError: data that cannot be read.
    """
    experiment = _experiment(comparison, MethodSection(name="linear_probe"))
    base, stated = load_experiment_base(experiment)
    example: Any = None

    def trains_shared(section: MethodSection) -> bool:
        nonlocal example
        if example is None and needs_example(section):
            first = next(iter(comparison.tasks))
            loaders = make_loaders(experiment, first, read_task(experiment, first), stated)
            example = first_rows({first: loaders})
        try:
            return make_plan(section, base, example).trains_shared
        except WeftError:  # its cells will fail, with this reason
            return Law.TASKS_ARE_ISOLATED in METHODS[section.name].exceptions

    return Fleet(comparison, tuple(make_cells(comparison, trains_shared)))


def open_fleet(folder: str | Path) -> Fleet:
    """The fleet of a folder, as its last run described it.

    Args:
        folder: the ``output`` of a comparison.

    Raises:
        DataError: there is none.
    """
    document = get_json(Path(folder) / DOCUMENT)
    if document is None:
        raise DataError(
            f"{folder} is not the folder of a comparison: it has no {DOCUMENT}. Run weft compare."
        )
    stated = {**document["comparison"], "output": str(folder)}
    comparison = validated(Comparison, stated)
    cells = []
    for entry in document["cells"]:
        place = str(Path(folder) / "cells" / entry["name"])
        experiment = validated(Experiment, {**entry["experiment"], "output": place})
        cells.append(Cell(**{**entry, "experiment": experiment}))
    return Fleet(comparison, tuple(cells))


def run_fleet(
    fleet: Fleet,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    devices: Sequence[str] | None = None,
    progress: bool = True,
    check_data: bool = True,
    skip: Collection[str] = (),
) -> FleetResult:
    """Run the cells that are not finished; whatever ends this, calling it again goes on.

    Args:
        fleet: the comparison's cells.
        jobs: processes that run cells at the same time, >= 1; one stays in this process.
        shard: ``(i, n)``: the i-th of n parts, counted from 1.
        devices: CUDA devices or "cpu", dealt to the processes in turn; default all that there are.
        progress: whether to show progress, on standard error.
        check_data: whether to read all data first, and warn of its problems.
        skip: names of cells to leave as they are.

    Raises:
        ConfigError: jobs or shard out of range, or a device that is not there.
        DataError: data that cannot be read.
        TrainingError: processes cannot start, or no space is left on the disk.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is a whole number of at least 1, found {jobs}.")
    dealt = check_devices(devices or ())
    mine = part_of(fleet.cells, shard)
    missing = [cell for cell in mine if not cell.finished and cell.name not in skip]
    if check_data:
        _check_data(fleet.comparison, missing)
    _write_document(fleet)
    failed: dict[str, str] = {}
    elsewhere: list[str] = []
    estimate = Estimate(missing, jobs)
    for cell in fleet.cells:
        result = cell.result()
        if result is not None:
            estimate.learn(cell, result["wall_seconds"])
    with Display(progress, missing, len(mine) - len(missing), estimate) as display:

        def on_event(cell: Cell, event: int | Outcome | None) -> None:
            display(cell, event)
            if isinstance(event, Outcome) and event.end == "failed":
                failed[cell.name] = event.reason
            elif isinstance(event, Outcome) and event.end == "elsewhere":
                elsewhere.append(cell.name)

        try:
            if jobs == 1 and devices is None:
                run_here(missing, on_event)
            else:
                run_spread(missing, jobs, dealt, on_event)
        except BaseException:
            with suppress(WeftError):  # what ended the run is what is to be told
                write_tables(fleet.root, fleet.table())
            raise
    frame = fleet.table()
    frame.attrs["failed"] = dict(failed)
    files = write_tables(fleet.root, frame)
    waiting = {cell.name for cell in fleet.cells if not cell.finished}
    busy = tuple(name for name in elsewhere if name in waiting)
    return FleetResult(frame, failed, busy, len(waiting), tuple(files))


def part_of(cells: Sequence[Cell], shard: tuple[int, int]) -> list[Cell]:
    """The cells of one of n parts: every n-th, so that all parts are alike.

    Raises:
        ConfigError: there is no such part.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise ConfigError(f"A shard is i/n with 1 <= i <= n, found {index}/{count}.")
    return list(cells[index - 1 :: count])


def compare(
    experiment: str | Path | Mapping[str, Any] | Comparison,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train tasks x methods x options x seeds and return everything measured as one table.

    Finished cells are never run again; interrupted ones go on from their checkpoints.

    Args:
        experiment: a YAML file of a comparison, or its content.
        overrides: ``key.of.value=value``, for a file.
        jobs: processes that run cells at the same time, >= 1. More than one needs, in a script,
            ``if __name__ == "__main__":``.
        shard: ``(i, n)``: run the i-th of n parts, counted from 1; parts may share a folder.
        devices: CUDA devices or "cpu", dealt to the processes in turn; default all that there are.
        progress: whether to show progress, on standard error.

    Returns:
        A row for each task of each finished cell; ``attrs["failed"]`` tells, by cell, why one
        failed.

    Raises:
        ConfigError: names the key, the value found and what was expected.
        DataError: data that cannot be read.
        TrainingError: processes cannot start, or no space is left on the disk.
    """
    fleet = make_fleet(read_comparison(experiment, overrides))
    return run_fleet(fleet, jobs=jobs, shard=shard, devices=devices, progress=progress).table


def dry_fleet(fleet: Fleet) -> dict[str, PlannedTask]:
    """What a task would own by each method with its options, by label, before any training.

    Warns of problems of the data.
    """
    _check_data(fleet.comparison, fleet.cells)
    planned = {}
    for cell in fleet.cells:
        if cell.label not in planned:
            first = {cell.tasks[0]: cell.experiment.tasks[cell.tasks[0]]}
            planned[cell.label] = dry_run(cell.experiment.model_copy(update={"tasks": first}))[0]
    return planned


def _experiment(comparison: Comparison, method: MethodSection) -> Experiment:
    return Experiment(
        base=comparison.base,
        method=method,
        tasks=comparison.tasks,
        data=comparison.data,
        train=comparison.train,
        output=comparison.output,
        seed=comparison.seed,
    )


def _check_data(comparison: Comparison, cells: Sequence[Cell]) -> None:
    """Read the data of all cells once, so that a wrong folder is told before any work.

    Raises:
        DataError: data that cannot be read, or a split of it that is empty.
    """
    experiment = _experiment(comparison, MethodSection(name="linear_probe"))
    for name in dict.fromkeys(task for cell in cells for task in cell.tasks):
        data = read_task(experiment, name)
        sizes = {k: len(rows) for k, rows in data.splits.items() if isinstance(rows, Sized)}
        found = f"({', '.join(f'{split} {size}' for split, size in sizes.items())})"
        for split, size in sizes.items():
            if not size:
                raise DataError(
                    f"tasks.{name}.data: {experiment.tasks[name].data} has no rows for {split} "
                    f"{found}. Give more data, or change its share: data.val, data.test."
                )
        warn_of_data(experiment, {name: data})


def _write_document(fleet: Fleet) -> None:
    """What the folder is about, for those who read it later."""
    cells = [{"name": cell.name, **cell.document()} for cell in fleet.cells]
    # Without what was not stated: a method's training differs only in what is stated for it.
    comparison = fleet.comparison.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    put_json(fleet.root / DOCUMENT, {"comparison": comparison, "cells": cells})
