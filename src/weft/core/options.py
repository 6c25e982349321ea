"""Options of functions: what cannot work is refused by its name. True is no number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NoReturn, TypeGuard, final

from weft.errors import PlanError, WeftError, close_matches

_IN_WORDS = {
    "(-inf, inf)": "a finite number",
    "(0, inf)": "a positive number",
    "[0, inf)": "a number >= 0",
}


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        return False


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether something is a whole number of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


@final
@dataclass(frozen=True)
class Options:
    """What a function was given: each of its options, checked.

    Args:
        function: whose options they are; "" where an option is known by its name alone.
        error: what is raised, with the option, what was found and what is expected.
    """

    function: str
    error: type[WeftError] = PlanError

    def word(self, option: str, value: object, known: Iterable[str | None]) -> None:
        """Refuse what is none of some words."""
        words = tuple(known)
        if not (value is None or isinstance(value, str)) or value not in words:
            known_words = [word for word in words if word is not None]
            hint = close_matches(value, known_words) if isinstance(value, str) else ""
            self._refuse(option, " or ".join(map(repr, words)), value, hint)

    def number(
        self, option: str, value: object, interval: str = "(-inf, inf)", also: str = ""
    ) -> None:
        """Refuse what is no finite number in an interval.

        Args:
            option: its name.
            value: what was given.
            interval: for instance ``[0, 1)`` or ``(0, inf)``.
            also: what else it could have been, for the message: "or None".
        """
        least, most = (float(end) for end in interval[1:-1].split(","))
        good = is_number(value) and (
            (least <= value if interval[0] == "[" else least < value)
            and (value <= most if interval[-1] == "]" else value < most)
        )
        if not good:
            expected = _IN_WORDS.get(interval, f"a number in {interval}")
            self._refuse(option, f"{expected} {also}".rstrip(), value)

    def whole(self, option: str, value: object, least: int, also: str = "") -> None:
        """Refuse what is no whole number of at least ``least``."""
        if not is_whole(value, least):
            expected = f"a whole number of at least {least} {also}".rstrip()
            self._refuse(option, expected, value)

    def seed(self, option: str, value: object) -> None:
        """Refuse what seeds no generator: anything but a whole number of 64 bits."""
        if not is_whole(value, -(2**63)) or value >= 2**64:
            self._refuse(option, "a whole number of 64 bits", value)

    def switch(self, option: str, value: object) -> None:
        """Refuse what is neither True nor False."""
        if not isinstance(value, bool):
            self._refuse(option, "True or False", value)

    def names(self, option: str, value: object, what: str) -> tuple[str, ...]:
        """Refuse what is no list of words, which a word alone is not.

        Args:
            option: its name.
            value: what was given.
            what: the option is, for the message: "names of blocks".

        Returns:
            The words; what can be read only once has been read now.
        """
        if isinstance(value, str):
            self._refuse(option, what, value, f" One is a list, too: {option}=[{value!r}].")
        if not isinstance(value, Iterable) or isinstance(value, Mapping):
            self._refuse(option, what, value)
        names = tuple(value)
        if not all(isinstance(name, str) for name in names):
            self._refuse(option, what, value)
        return names

    def _refuse(self, option: str, expected: str, value: object, hint: str = "") -> NoReturn:
        label = f"{self.function}({option}=...)" if self.function else option
        raise self.error(f"{label} is {expected}, found {value!r}.{hint}")
