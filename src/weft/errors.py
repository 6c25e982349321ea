"""Errors of weft: each says what was found, what was expected, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeftError(Exception):
    """Any error that weft raises on purpose."""


class PlanError(WeftError, ValueError):
    """A sharing plan does not fit its base, its tasks, or what is asked of it."""


class TaskError(WeftError, ValueError):
    """A task is unknown, already there, or given what it cannot use."""


class DataError(WeftError, ValueError):
    """Data cannot be used: a wrong shape, a label outside the classes, an empty loader."""


class DataWarning(UserWarning):
    """Data can be used, but what comes of it may be worth little."""


class LeaseError(WeftError, RuntimeError):
    """A view was rebound while a forward or a backward still needed its tensors."""


class BankError(WeftError, ValueError):
    """A stored task is damaged, foreign, or bound to another base."""


class ConfigError(WeftError, ValueError):
    """A configuration names something that does not exist or has a wrong value."""


class ExportError(WeftError, RuntimeError):
    """A task cannot leave: it has no graph, a check failed, or its file cannot be written."""


class TrainingError(WeftError, RuntimeError):
    """Training cannot go on, for instance because a loss is not finite."""


class MissingExtra(WeftError, ImportError):
    """An optional dependency is needed.

    Args:
        what: what was asked for, as a noun ("a timm base").
        extra: the extra of the package that installs it.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs an extra. Install it with: pip install 'weft-share[{extra}]'"
        )


def kind_of(value: object) -> str:
    """What was found in the place of something else, in words for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def close_matches(name: str, known: Iterable[str]) -> str:
    """The names of ``known`` that resemble ``name``, as a sentence to append to an error.

    Args:
        name: the name that was not found.
        known: the names that exist.

    Returns:
        ``" Close matches: a, b."`` or an empty string.
    """
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Close matches: {', '.join(matches)}." if matches else ""
