"""The batcher: requests that wait are run together, and each gets its own answer or error."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from weft.errors import DataError

from .answers import Answer
from .refusals import OverloadedError, StoppingError
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


@final
@dataclass(frozen=True, eq=False)
class _Request:
    """A job that waits, with the place for its answer: the answer can go nowhere else."""

    work: Work
    job: Job
    arrived: float
    answer: asyncio.Future[Any]


@final
class Batcher:
    """Gathers requests into batches; belongs to the event loop that it is started on.

    Requests that may run together wait until they have ``max_batch`` rows or the first of them has
    waited for ``max_delay``; inputs of different shape or type never meet. The group whose first
    request came earliest goes first. If a batch fails, its requests run one by one, so that only
    the guilty one fails. A request that is cancelled before it runs is dropped.

    Args:
        max_batch: rows in a batch, >= 1.
        max_delay: milliseconds, >= 0.
        max_queue: requests that may wait, >= 1.
        observe: called with the rows and the distinct tasks of every batch that runs.
    """

    def __init__(
        self,
        *,
        max_batch: int = 32,
        max_delay: float = 5.0,
        max_queue: int = 256,
        observe: Callable[[int, int], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self._delay = max_delay / 1000
        self._observe = observe
        self._groups: dict[Hashable, deque[_Request]] = {}
        self._waiting = 0
        self._stopping = False
        self.accepted = 0
        self.answered = 0
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "weft-forward")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for their batch."""
        return self._waiting

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stopping

    def start(self) -> None:
        """Begin to run requests, on the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """Take no more requests, and wait until all that were taken have their answers."""
        self._stopping = True
        self._wake.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def submit(self, work: Work, x: Tensor, tasks: Sequence[str]) -> Any:
        """Have a request run and wait for its answer.

        Args:
            work: what to do.
            x: (rows, ...) inputs, at most ``max_batch`` rows.
            tasks: names, as the work takes them.

        Returns:
            What the work gives for this request.

        Raises:
            DataError: too many rows.
            OverloadedError: ``max_queue`` requests wait already.
            StoppingError: `stop` was called.
        """
        if len(x) > self.max_batch:
            raise DataError(f"Found {len(x)} rows; a request may have up to {self.max_batch}.")
        if self._stopping:
            raise StoppingError("The server is stopping.")
        if self._waiting >= self.max_queue:
            raise OverloadedError(f"{self._waiting} requests are waiting already. Try again later.")
        loop = asyncio.get_running_loop()
        job = Job(x, tuple(tasks))
        request = _Request(work, job, loop.time(), loop.create_future())
        key = (work, work.kind(job.tasks), x.shape[1:], x.dtype)
        group = self._groups.setdefault(key, deque())
        group.append(request)
        self._waiting += 1
        self.accepted += 1
        if len(group) == 1 or self._is_full(group):
            self._wake.set()
        try:
            return await request.answer
        finally:
            if request in group:  # cancelled before it ran
                group.remove(request)
                self._waiting -= 1
                if not group and self._groups.get(key) is group:
                    del self._groups[key]

    # ---------------------------------------------------------------- inside

    async def _serve(self) -> None:
        while True:
            key = self._next_group()
            if key is not None:
                await self._run(self._take(key))
            elif self._stopping and not self._groups:
                return
            else:
                await self._something()

    def _next_group(self) -> Hashable | None:
        """The group to run now: of those that are ready, the one with the earliest request."""
        latest = asyncio.get_running_loop().time() - self._delay
        ready = [
            (group[0].arrived, key)
            for key, group in self._groups.items()
            if self._stopping or group[0].arrived <= latest or self._is_full(group)
        ]
        return min(ready, key=lambda entry: entry[0])[1] if ready else None

    async def _something(self) -> None:
        """Wait until a group begins, is full, or has waited long enough."""
        loop = asyncio.get_running_loop()
        first = min((group[0].arrived for group in self._groups.values()), default=None)
        timer = None if first is None else loop.call_at(first + self._delay, self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()

    def _is_full(self, group: deque[_Request]) -> bool:
        return sum(len(request.job.x) for request in group) >= self.max_batch

    def _take(self, key: Hashable) -> list[_Request]:
        """The first requests of a group, as many as fit into a batch."""
        group, batch, rows = self._groups[key], [], 0
        while group and rows + len(group[0].job.x) <= self.max_batch:
            rows += len(group[0].job.x)
            batch.append(group.popleft())
        self._waiting -= len(batch)
        if not group:
            del self._groups[key]
        return [request for request in batch if not request.answer.done()]

    async def _run(self, batch: list[_Request]) -> None:
        if not batch:
            return
        work, jobs = batch[0].work, [request.job for request in batch]
        loop = asyncio.get_running_loop()
        try:
            if self._observe is not None:
                tasks = {name for job in jobs for name in job.tasks}
                self._observe(sum(len(job.x) for job in jobs), len(tasks))
            answers = await loop.run_in_executor(self._thread, work.run, jobs)
            pairs = list(zip(batch, answers, strict=True))
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                    self.answered += 1
                return
            for request in batch:
                await self._run([request] if not request.answer.done() else [])
        else:
            for request, answer in pairs:
                if not request.answer.done():
                    request.answer.set_result(answer)
                    self.answered += 1
