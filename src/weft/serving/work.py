"""What batches are made of, and what is done with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from .answers import Answer
from .server import Server


@final
@dataclass(frozen=True)
class Job:
    """What one request asks for.

    Args:
        x: (rows, ...) inputs.
        tasks: names; what they mean is up to the work.
    """

    x: Tensor
    tasks: tuple[str, ...]


class Work(ABC):
    """What is done for requests of one kind; runs in a thread of its own."""

    @abstractmethod
    def kind(self, tasks: tuple[str, ...]) -> Hashable:
        """Equal for requests that may run together."""

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """The answers, one for each job, in their order."""


@final
class TaskPerRow(Work):
    """Each row has a task of its own; a job's answer is a list of `Answer` by row.

    Args:
        server: runs them.
        mixed: whether rows of different tasks run in one batch; otherwise requests of one choice
            of tasks wait for each other.
    """

    def __init__(self, server: Server, *, mixed: bool = True) -> None:
        self._server = server
        self._mixed = mixed

    def kind(self, tasks: tuple[str, ...]) -> Hashable:
        return None if self._mixed else frozenset(tasks)

    def run(self, jobs: Sequence[Job]) -> Sequence[list[Answer]]:
        names = [name for job in jobs for name in job.tasks]
        answers = self._server.answers(_joined(jobs), names)
        return _cut(answers, jobs)


@final
class EveryTask(Work):
    """All of a job's tasks answer for each row: a job's answer is a list of lists of `Answer`.

    Args:
        server: runs them.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    def kind(self, tasks: tuple[str, ...]) -> Hashable:
        return tasks

    def run(self, jobs: Sequence[Job]) -> Sequence[list[list[Answer]]]:
        return _cut(self._server.all_answers(_joined(jobs), jobs[0].tasks), jobs)


def _joined(jobs: Sequence[Job]) -> Tensor:
    return jobs[0].x if len(jobs) == 1 else torch.cat([job.x for job in jobs])


def _cut(rows: list[Any], jobs: Sequence[Job]) -> list[list[Any]]:
    ends = [0]
    for job in jobs:
        ends.append(ends[-1] + len(job.x))
    return [rows[begin:end] for begin, end in pairwise(ends)]
