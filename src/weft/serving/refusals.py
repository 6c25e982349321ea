"""What a server refuses although the request itself is sound."""

from __future__ import annotations

from weft.errors import WeftError


class NoRoomError(WeftError, RuntimeError):
    """Tasks do not fit into the memory that a server may use for what tasks own."""


class OverloadedError(WeftError, RuntimeError):
    """As many requests wait as may wait."""


class StoppingError(WeftError, RuntimeError):
    """The server finishes what it has accepted and accepts no more."""
