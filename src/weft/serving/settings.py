"""How a server answers over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from .inputs import InputSpec, Limits


@final
@dataclass(frozen=True)
class Settings:
    """How a server answers over HTTP.

    Args:
        inputs: what the base takes.
        limits: what a request may cost.
        max_batch: rows in a batch, and so in a request.
        max_delay: milliseconds that a request waits for others.
        max_queue: requests that may wait.
        max_queue_bytes: of inputs that may wait.
        max_answers: of one request: its rows times its tasks.
        mixed: whether rows of different tasks run in one batch.
        token: asked for as ``Authorization: Bearer``; None for no token.
        hosts: names that a browser may know the server by; None for any.
    """

    inputs: InputSpec = field(default_factory=InputSpec)
    limits: Limits = field(default_factory=Limits)
    max_batch: int = 32
    max_delay: float = 5.0
    max_queue: int = 256
    max_queue_bytes: int = 512_000_000
    max_answers: int = 1024
    mixed: bool = True
    token: str | None = None
    hosts: tuple[str, ...] | None = None
