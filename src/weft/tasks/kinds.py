"""The kinds of built-in tasks, and tasks from their descriptions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weft.core.task import Task
from weft.errors import ConfigError, close_matches

from .binary import Binary
from .classification import Classification
from .dense import DenseRegression
from .depth import Depth
from .normals import SurfaceNormals
from .regression import Regression
from .segmentation import Segmentation

KINDS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "binary": Binary,
    "regression": Regression,
    "segmentation": Segmentation,
    "depth": Depth,
    "surface_normals": SurfaceNormals,
    "dense_regression": DenseRegression,
}


def check_options(kind: str, options: Iterable[str]) -> None:
    """Refuse options that a kind of task does not have.

    Args:
        kind: one of `KINDS`.
        options: names of options.

    Raises:
        ConfigError: an unknown kind or option, with close matches.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"There is no kind of task {kind!r}. Kinds: {', '.join(KINDS)}."
            + close_matches(str(kind), KINDS)
        )
    known = list(inspect.signature(KINDS[kind]).parameters)
    for name in options:
        if name not in known:
            hint = close_matches(name, known) or f" Options: {', '.join(known)}."
            raise ConfigError(f"Task of kind '{kind}': there is no option '{name}'.{hint}")


def task_from_spec(spec: Mapping[str, Any]) -> Task:
    """A built-in task from its description, for instance ``{"kind": "binary", "labels": 3}``.

    Args:
        spec: the kind, and the options of its function.

    Returns:
        The task, whose ``spec`` is this description with all options in it.

    Raises:
        ConfigError: an unknown kind or option, with close matches, or one that is missing.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    check_options(kind, options)
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"Task of kind '{kind}': {error}.") from None
