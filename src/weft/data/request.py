"""A data spec taken apart: what every reader is given, and the errors they share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from weft.errors import DataError, close_matches

# Options follow the last "#", so that paths may hold "#" themselves.
_OPTIONS = re.compile(r"^(?P<path>.*)#(?P<options>\w+=[^&]*(?:&\w+=[^&]*)*)$")


@final
@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Args:
        spec: the whole spec, for messages.
        path: the part between the prefix and the options.
        options: the options after ``#``, by name.
        seed: seed of the split, where the data fixes none.
        val: share of the samples for validation, 0..1.
        test: share of the samples for the test split, 0..1.
        image_size: side of the square that images are resized to, or None.
    """

    spec: str
    path: str
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    val: float = 0.15
    test: float = 0.15
    image_size: int | None = None

    @property
    def file(self) -> Path:
        """The path with ``~`` expanded."""
        return Path(self.path).expanduser()

    def error(self, problem: str) -> DataError:
        """An error that begins with the spec.

        Args:
            problem: what was found, what was expected and what to do.

        Returns:
            The error, to be raised.
        """
        return DataError(f"{self.spec}: {problem}")

    def existing(self, *, folder: bool) -> Path:
        """The path, once it is known to exist.

        Args:
            folder: whether a folder is expected, else a file.

        Returns:
            The path.

        Raises:
            DataError: nothing is there, or the other kind; says what the folder above holds.
        """
        path, kind = self.file, "folder" if folder else "file"
        if path.is_dir() if folder else path.is_file():
            return path
        if path.exists():
            raise self.error(f"{path} is not a {kind}. Give the path of a {kind}.")
        above = path.parent
        while not above.is_dir():
            above = above.parent
        names = sorted(p.name for p in above.iterdir() if not p.name.startswith("."))
        raise self.error(
            f"there is no {kind} {path}. {above.resolve()} holds: {listing(names)}."
            f"{close_matches(path.name, names)} Correct the path; relative paths start from "
            f"{Path.cwd()}."
        )

    def choice(self, option: str, allowed: Iterable[str]) -> str | None:
        """The value of an option that has a closed set of values.

        Args:
            option: name of the option.
            allowed: its values.

        Returns:
            The value, or None where the option is not given.

        Raises:
            DataError: the value is not among them.
        """
        value, names = self.options.get(option), list(allowed)
        if value is not None and value not in names:
            raise self.unknown(f"{option}={value}", value, names)
        return value

    def unknown(self, what: str, name: str, known: Iterable[str]) -> DataError:
        """An error for a name that does not exist.

        Args:
            what: the thing looked for, as found in the spec.
            name: the name in it to compare with the known ones.
            known: the names that exist.

        Returns:
            The error, to be raised.
        """
        names = list(known)
        return self.error(
            f"found {what}; expected one of: {listing(names)}.{close_matches(name, names)}"
        )


def listing(names: Iterable[str], most: int = 12) -> str:
    """Names for an error message, cut where there are many.

    Args:
        names: the names.
        most: how many to write out, >= 1.

    Returns:
        ``"a, b and 3 more"``, or ``"nothing"``.
    """
    every = list(names)
    if not every:
        return "nothing"
    shown = ", ".join(every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"


def split_spec(rest: str) -> tuple[str, dict[str, str]]:
    """Separate path and options of ``PATH#name=value&name=value``.

    Args:
        rest: the spec without its prefix.

    Returns:
        The path, and the options by name.
    """
    match = _OPTIONS.match(rest)
    if match is None:
        return rest, {}
    pairs = (pair.partition("=") for pair in match["options"].split("&"))
    return match["path"], {name: value for name, _, value in pairs}
