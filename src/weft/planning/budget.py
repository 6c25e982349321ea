"""Budgets as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from weft.errors import ConfigError
from weft.sizes import size_in_bytes


def budget_in_bytes(budget: int | str, base_bytes: int) -> int:
    """The bytes that all tasks together may own.

    Args:
        budget: bytes; or a size such as ``3MB``; or ``1.5x``: everything, the base included, takes
            at most 1.5 times the bytes of the base, so that the tasks may own half of them.
        base_bytes: of the base.

    Raises:
        ConfigError: it is none of these, or leaves nothing.
    """
    if isinstance(budget, int):
        if budget < 0:
            raise ConfigError(f"budget: found {budget}, expected at least 0 bytes.")
        return budget
    times = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", budget)
    if times is None:
        try:
            return size_in_bytes(budget, least=0)
        except ConfigError as error:
            raise ConfigError(f"budget: {error} Or 1.5x, times the bytes of the base.") from None
    factor = float(times[1])
    if factor < 1:
        raise ConfigError(
            f"budget: found '{budget}', expected at least 1x: the base is part of what is counted."
        )
    return int((Decimal(times[1]) - 1) * base_bytes)
