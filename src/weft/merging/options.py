"""Options of merging: what cannot work is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from weft.core.numbers import is_number, is_whole
from weft.errors import ConfigError, DataError, close_matches


def check_number(
    option: str,
    value: object,
    expected: str = "a finite number",
    fits: Callable[[float], bool] = lambda _: True,
) -> None:
    """Refuse what is no finite number, or not in its range.

    Args:
        option: what it is the value of, for instance ``merge(scale=...)``.
        value: what was given.
        expected: in words.
        fits: whether a finite number is in the range.

    Raises:
        ConfigError: names the option, what was found and what is expected.
    """
    if not is_number(value) or not fits(float(value)):
        raise ConfigError(f"{option} is {expected}, found {value!r}.")


def check_whole(option: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        ConfigError: as for `check_number`.
    """
    if not is_whole(value, least):
        raise ConfigError(f"{option} is a whole number of at least {least}, found {value!r}.")


def check_switch(option: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: as for `check_number`.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{option} is True or False, found {value!r}.")


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
            f"{function}(data=...) is a dict of batches by task, found {_kind(data)}. "
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
                f"{function}(data=...) has for '{task}' {_kind(batches)}, which is no batches. "
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
                f"The data of '{task}' is {_kind(data[task])}, which can be read only once, and "
                "every scale is tried on all of it. Give a DataLoader or a list of batches, or a "
                "number as scale."
            )


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
