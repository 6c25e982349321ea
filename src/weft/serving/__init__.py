"""Serving: the tasks of a bank on one resident base, in a process and over HTTP."""

from .answers import Answer
from .batcher import Batcher
from .directory import Changes
from .refusals import LoadError, NoRoomError, OverloadedError, StoppingError
from .server import Server
from .work import EveryTask, Job, TaskPerRow, Work

__all__ = [
    "Answer",
    "Batcher",
    "Changes",
    "EveryTask",
    "Job",
    "LoadError",
    "NoRoomError",
    "OverloadedError",
    "Server",
    "StoppingError",
    "TaskPerRow",
    "Work",
]
