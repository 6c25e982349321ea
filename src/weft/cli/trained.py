"""What a stored task says of its training; anything may stand there, since users can write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from weft.errors import ConfigError


@final
@dataclass(frozen=True)
class Trained:
    """The experiment that made a task, as far as other commands need it; None is unsaid.

    Args:
        seed: of the draw of the base.
        base: its name.
        weights: a file of weights for it.
        options: of the function that makes it.
        mean: of each channel.
        std: likewise.
        image_size: side of the images.
    """

    seed: int = 0
    base: str | None = None
    weights: str | None = None
    options: dict[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


def trained(facts: Mapping[str, Any]) -> Trained:
    """What a task's facts say.

    Args:
        facts: of a stored task.

    Raises:
        ConfigError: a value of a wrong type.
    """
    found = facts.get("experiment")
    if not isinstance(found, dict) or "base" not in found:
        return Trained()  # a word of a user's own
    base = _section(found, "base")
    return Trained(
        seed=_value(found, "seed", int) or 0,
        base=_value(base, "name", str),
        weights=_value(base, "weights", str),
        options=_value(base, "options", dict),
        mean=_numbers(base, "mean"),
        std=_numbers(base, "std"),
        image_size=_value(_section(found, "data"), "image_size", int),
    )


def _section(found: dict[str, Any], key: str) -> dict[str, Any]:
    return _value(found, key, dict) or {}


def _value(section: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = section.get(key)
    if value is not None and type(value) is not kind:
        raise _wrong(key, value, kind.__name__)
    return value


def _numbers(section: dict[str, Any], key: str) -> tuple[float, ...] | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or any(type(v) not in (int, float) for v in value):
        raise _wrong(key, value, "list of numbers")
    return tuple(value) or None


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"The bank's task says of its training: {key}={str(value)[:80]!r}; expected a {expected}. "
        "Correct its facts['experiment'] and save it again, or remove them."
    )
