"""Where the tasks to merge come from: a model that holds them, or a bank and its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from weft.bank import Bank
from weft.core.model import MultiTaskModel
from weft.errors import ConfigError, TaskError, close_matches

Source = MultiTaskModel | Bank


def check_source(function: str, source: object, base: object) -> None:
    """Refuse what holds no tasks, a bank without its base, and a model with another one.

    Args:
        function: what they were given to.
        source: expected is a model or a bank.
        base: expected is a module with a bank, and None with a model.

    Raises:
        ConfigError: says what was found.
    """
    if isinstance(source, MultiTaskModel):
        if base is not None:
            raise ConfigError(
                f"{function}(base=...) belongs to a bank; a model has its base. Leave it out."
            )
    elif not isinstance(source, Bank):
        raise ConfigError(
            f"{function} expects a weft.MultiTaskModel or a weft.Bank, found "
            f"{type(source).__name__}. Open a bank with weft.Bank(path)."
        )
    elif not isinstance(base, nn.Module):
        found = "none" if base is None else f"an object of type {type(base).__name__}"
        raise ConfigError(
            f"{function} of a bank needs base=, the module that its tasks were trained on; found "
            f"{found}."
        )


def chosen_tasks(source: Source, tasks: Iterable[str] | str | None) -> tuple[str, ...]:
    """The names of the tasks to merge.

    Args:
        source: holds them.
        tasks: their names, one name, or None for all.

    Raises:
        TaskError: one is no name, is unknown or is named twice, or there is none.
    """
    known = source.task_names if isinstance(source, MultiTaskModel) else source.tasks()
    if tasks is None:
        names: Sequence[str] = known
    elif isinstance(tasks, str):
        names = (tasks,)
    elif isinstance(tasks, Iterable):
        names = tuple(tasks)
    else:
        raise TaskError(
            f"tasks are names of tasks, found an object of type {type(tasks).__name__}."
        )
    for name in names:
        if not isinstance(name, str):
            raise TaskError(f"Tasks to merge are named by strings, found {name!r}.")
        if name not in known:
            raise TaskError(
                f"There is no task '{name}' to merge. Tasks: {', '.join(known) or 'none'}."
                + close_matches(name, known)
            )
    if len(set(names)) < len(names):
        raise TaskError(f"Tasks are named twice: {', '.join(names)}. Name each once.")
    if not names:
        raise TaskError(f"There is no task to merge. Name some of: {', '.join(known) or 'none'}.")
    return tuple(names)


def opened(source: Source, tasks: Sequence[str], base: nn.Module | None) -> MultiTaskModel:
    """The model itself, or the bank's tasks on their base.

    Raises:
        BankError: as for `Bank.load`.
    """
    if isinstance(source, MultiTaskModel):
        return source
    assert base is not None  # `check_source` has seen to it
    return source.load(base, *tasks)
