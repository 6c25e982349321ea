"""Options of merging: what cannot work is refused by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from weft.errors import DataError, close_matches, kind_of


def check_data(function: str, data: object, tasks: Sequence[str]) -> None:
    """Refuse data that does not give batches for every task.

    Args:
        function: what it was given to.
        data: expected is a dict by task.
        tasks: those that are merged.

    Raises:
        DataError: says what is missing, or what was found.
    """
    if not isinstance(data, Mapping):
        raise DataError(
            f"{function}(data=...) is a dict of batches by task, found {kind_of(data)}. "
            f"Give data={{{tasks[0]!r}: batches, ...}}."
        )
    for task in tasks:
        if task not in data:
            known = [name for name in data if isinstance(name, str)]
            raise DataError(
                f"{function}(data=...) has no data of '{task}', found data of "
                f"{', '.join(known) or 'no task'}. Give batches for every task that is merged."
                + close_matches(task, known)
            )
        batches = data[task]
        if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, str, Mapping)):
            raise DataError(
                f"{function}(data=...) has for '{task}' {kind_of(batches)}, which is no batches. "
                "Give a DataLoader or a list of batches."
            )


def check_rereadable(data: Mapping[str, object], tasks: Sequence[str]) -> None:
    """Refuse iterators, which are empty after they were read once.

    Raises:
        DataError: names the task.
    """
    for task in tasks:
        if isinstance(data[task], Iterator):
            raise DataError(
                f"The data of '{task}' is {kind_of(data[task])}, which can be read only once, and "
                "every scale is tried on all of it. Give a DataLoader or a list of batches, or a "
                "number as scale."
            )
