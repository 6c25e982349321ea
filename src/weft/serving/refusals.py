"""What a server refuses although the request itself is sound."""

from __future__ import annotations

from weft.errors import BankError, WeftError


class NoRoomError(WeftError, RuntimeError):
    """Tasks do not fit into the memory that a server may use for what tasks own."""


class LoadError(BankError):
    """A task cannot be loaded.

    Args:
        task: its name.
        why: what is wrong with it.
    """

    def __init__(self, task: str, why: str) -> None:
        super().__init__(why)
        self.task = task


class OverloadedError(WeftError, RuntimeError):
    """As many requests wait as may wait."""


class StoppingError(WeftError, RuntimeError):
    """The server finishes what it has accepted and accepts no more."""
