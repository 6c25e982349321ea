"""The batcher: requests that wait are run together, and each gets its own answer or error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from weft.errors import DataError

from .refusals import OverloadedError, StoppingError
from .work import Job, Work


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
        max_queue_bytes: of the inputs that wait; a request that waits alone may have more.
        observe: called with the rows and the distinct tasks of every batch that runs.
    """

    def __init__(
        self,
        *,
        max_batch: int = 32,
        max_delay: float = 5.0,
        max_queue: int = 256,
        max_queue_bytes: int = 512_000_000,
        observe: Callable[[int, int], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_queue_bytes = max_queue_bytes
        self._delay = max_delay / 1000
        self._observe = observe
        self._groups: dict[Hashable, deque[_Request]] = {}
        self._waiting = 0
        self._bytes = 0
        self._at_work = False
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

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self._waiting > 0 or self._at_work

    @property
    def failed(self) -> bool:
        """Whether nothing runs requests any more although nobody has stopped it."""
        return self._worker is not None and self._worker.done() and not self._stopping

    def check_room(self, size: int = 0) -> None:
        """Refuse a request that would find the queue full.

        Args:
            size: bytes of its inputs, as far as they are known.

        Raises:
            OverloadedError: too much waits already.
        """
        if self._waiting >= self.max_queue:
            raise OverloadedError(f"{self._waiting} requests are waiting already. Try again later.")
        if self._waiting and self._bytes + size > self.max_queue_bytes:
            raise OverloadedError(
                f"{self._bytes:,} bytes of inputs are waiting already. Try again later."
            )

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
            OverloadedError: as much waits already as may wait.
            StoppingError: `stop` was called, or the batcher has failed.
        """
        if len(x) > self.max_batch:
            raise DataError(f"Found {len(x)} rows; a request may have up to {self.max_batch}.")
        if self._stopping:
            raise StoppingError("The server is stopping.")
        if self.failed:
            raise StoppingError("Requests are not run any more. Start the server again.")
        size = x.nbytes
        self.check_room(size)
        loop = asyncio.get_running_loop()
        job = Job(x, tuple(tasks))
        request = _Request(work, job, loop.time(), loop.create_future())
        key = (work, work.kind(job.tasks), x.shape[1:], x.dtype)
        group = self._groups.setdefault(key, deque())
        group.append(request)
        self._waiting += 1
        self._bytes += size
        self.accepted += 1
        if len(group) == 1 or self._is_full(group):
            self._wake.set()
        try:
            return await request.answer
        finally:
            if request in group:  # cancelled before it ran
                group.remove(request)
                self._waiting -= 1
                self._bytes -= size
                if not group and self._groups.get(key) is group:
                    del self._groups[key]

    # ---------------------------------------------------------------- inside

    async def _serve(self) -> None:
        try:
            await self._run_batches()
        finally:
            for group in self._groups.values():  # none are left unless something went wrong
                _let_go(group)

    async def _run_batches(self) -> None:
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
        self._bytes -= sum(request.job.x.nbytes for request in batch)
        if not group:
            del self._groups[key]
        return [request for request in batch if not request.answer.done()]

    async def _run(self, batch: list[_Request]) -> None:
        self._at_work = True
        try:
            await self._answer(batch)
        finally:
            self._at_work = False
            _let_go(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        if not batch:
            return
        answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._ran, batch)
        if not isinstance(answers, Exception):
            for request, answer in zip(batch, answers, strict=True):
                if not request.answer.done():
                    request.answer.set_result(answer)
                    self.answered += 1
        elif len(batch) > 1:
            for request in batch:
                await self._answer([] if request.answer.done() else [request])
        elif not batch[0].answer.done():
            batch[0].answer.set_exception(answers)
            self.answered += 1

    def _ran(self, batch: Sequence[_Request]) -> Sequence[Any] | Exception:
        """The answers of a batch, or the error as a value: raised, not every one would arrive."""
        jobs = [request.job for request in batch]
        try:
            if self._observe is not None:
                tasks = {name for job in jobs for name in job.tasks}
                self._observe(sum(len(job.x) for job in jobs), len(tasks))
            answers = batch[0].work.run(jobs)
            if len(answers) != len(jobs):
                raise ValueError(f"Found {len(answers)} answers for {len(jobs)} requests.")
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                return error
            # The one ends loops, and the others end threads, wherever they are raised again.
            found = RuntimeError(f"A {type(error).__name__} came out of the base or a head.")
            found.__cause__ = error
            return found
        return answers


def _let_go(requests: Iterable[_Request]) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(StoppingError("The server gave up before the answer."))
