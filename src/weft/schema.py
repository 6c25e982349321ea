"""YAML files with a schema: read, overridden and checked, with errors that name the key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, close_matches


class Section(BaseModel):
    """Keys of a file, none but those it names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a YAML file with overrides, not checked yet.

    Args:
        path: the file.
        overrides: ``key.of.value=value`` with the value in YAML, later ones win.

    Raises:
        ConfigError: there is no file, it is no YAML, or it has no keys.
    """
    file = Path(path)
    if not file.is_file():
        beside = [path.name for path in file.parent.glob("*.y*ml")]
        hint = close_matches(file.name, beside)
        raise ConfigError(f"There is no file '{file}'. Give the YAML file of an experiment.{hint}")
    try:
        content = _parse(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"'{file}' is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{file}' holds {type(content).__name__}; expected keys such as base:.")
    for override in overrides:
        _set(content, override)
    return content


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"An override is key.of.value=value, found '{override}'.")
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        if isinstance(place, dict) and isinstance(place.get(part), str) and part == "method":
            place[part] = {"name": place[part]}
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(
                f"The override '{override}' goes through '{part}', which has no keys."
            )
    try:
        place[last] = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override '{override}' is not YAML: {error}") from None


SectionType = TypeVar("SectionType", bound=Section)


def validated(schema: type[SectionType], content: Mapping[str, Any]) -> SectionType:
    """Check content against a schema.

    Args:
        schema: the section that the content must be.
        content: plain values.

    Raises:
        ConfigError: names every wrong key, what was found and what was expected.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            "The configuration has "
            + ("an error" if error.error_count() == 1 else f"{error.error_count()} errors")
            + ":\n"
            + "\n".join(f"  {_explain(schema, dict(e))}" for e in error.errors())
        ) from None


def _explain(schema: type[BaseModel], error: dict[str, Any]) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, path[:-1])
        hint = close_matches(path[-1], known) or f" Keys here: {', '.join(known)}."
        return f"{key}: no such key.{hint}"
    if error["type"] == "missing":
        return f"{key}: missing."
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    where = f"{key}: " if key else ""
    return f"{where}found {error['input']!r}, {message[0].lower()}{message[1:].rstrip('.')}."


def _known_keys(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of the section at a path."""
    section = schema
    for part in path:
        if part in section.model_fields:  # the other parts are keys and places within it
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: itself, or as values of a dict, a list or an optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = map(_section_in, get_args(annotation))
    return next((section for section in found if section is not None), None)
