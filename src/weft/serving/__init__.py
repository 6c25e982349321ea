"""Serving: the tasks of a bank on one resident base, in a process and over HTTP."""

from .answers import Answer
from .batcher import Batcher, EveryTask, Job, TaskPerRow, Work
from .refusals import NoRoomError, OverloadedError, StoppingError
from .server import Changes, Server

__all__ = [
    "Answer",
    "Batcher",
    "Changes",
    "EveryTask",
    "Job",
    "NoRoomError",
    "OverloadedError",
    "Server",
    "StoppingError",
    "TaskPerRow",
    "Work",
]
