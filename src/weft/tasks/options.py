"""What the functions that make built-in tasks have in common: options and names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from weft.errors import ConfigError

Variant = Literal["standard", "adashare"]
"""How scores are measured: in the usual way, or as AdaShare's code does."""

VARIANTS: tuple[Variant, ...] = ("standard", "adashare")


def class_names(
    classes: int | Sequence[str], *, at_least: int
) -> tuple[tuple[str, ...] | None, int]:
    """The names of classes or labels, if they have any, and their number.

    Args:
        classes: how many, or their names in the order of the labels.
        at_least: the smallest number that makes sense, >= 1.

    Raises:
        ConfigError: too few, or names that repeat.
    """
    names = None if isinstance(classes, int) else tuple(str(c) for c in classes)
    count = classes if isinstance(classes, int) else len(classes)
    if count < at_least:
        raise ConfigError(f"Expected at least {at_least} classes or labels, found {count}.")
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"Class names repeat: {', '.join(names)}.")
    return names, count


def plain_classes(names: tuple[str, ...] | None, count: int) -> int | list[str]:
    """Classes as a description holds them: their names, else their number."""
    return count if names is None else list(names)
