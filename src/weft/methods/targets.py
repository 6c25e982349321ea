"""Choosing modules by name, with the meanings that PEFT's users know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from weft.errors import PlanError, close_matches

Value = TypeVar("Value")


def chosen(pattern: str | Sequence[str], names: Iterable[str], option: str) -> set[str]:
    """The names that a pattern matches.

    Args:
        pattern: a list of names or of what names end with after a dot, or one regular expression
            for the whole name.
        names: of modules.
        option: what the pattern was given as, for errors.

    Raises:
        PlanError: a part of the pattern matches nothing, or is no regular expression.
    """
    known = list(names)
    if isinstance(pattern, str):
        expression = _compiled(pattern, option)
        found = {name for name in known if expression.fullmatch(name)}
        if not found:
            raise PlanError(
                f"{option}={pattern!r} is a regular expression that no layer's whole name matches. "
                f"To match how names end, give a list: {option}=[{pattern!r}]."
                + close_matches(pattern, _ends(known))
            )
        return found
    chosen_names: set[str] = set()
    for end in pattern:
        found = {name for name in known if name == end or name.endswith(f".{end}")}
        if not found:
            raise PlanError(
                f"{option}: no layer is called '{end}' or ends with '.{end}'."
                + close_matches(end, _ends(known))
            )
        chosen_names |= found
    return chosen_names


def patterned(values: Mapping[str, Value], names: Iterable[str], option: str) -> dict[str, Value]:
    """By name, the value of the first pattern that its end matches after a dot.

    Args:
        values: by regular expression.
        names: of modules.
        option: what the patterns were given as, for errors.

    Raises:
        PlanError: a pattern matches nothing, or is no regular expression.
    """
    known = list(names)
    unused = set(values)
    found: dict[str, Value] = {}
    for name in known:
        for pattern, value in values.items():
            if _compiled(rf"(.*\.)?({pattern})", option).fullmatch(name):
                unused.discard(pattern)
                found[name] = value
                break
    if unused:
        first = sorted(unused)[0]
        raise PlanError(
            f"{option}: no adapted layer's name ends as '{first}' says, or an earlier pattern "
            "takes it." + close_matches(first, _ends(known))
        )
    return found


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PlanError(f"{option}: '{pattern}' is no regular expression: {error}.") from error


def _ends(names: Iterable[str]) -> list[str]:
    """Names and their last parts, for close matches."""
    return list(dict.fromkeys(part for name in names for part in (name, name.rpartition(".")[2])))
