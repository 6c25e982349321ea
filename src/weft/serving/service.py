"""What happens between a request and its response, apart from routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, final

import torch
from starlette.requests import Request
from torch import Tensor

from weft.errors import BankError, DataError, TaskError, close_matches

from .answers import Answer, plain_answer
from .batcher import Batcher
from .bodies import BodyReader, files_of, form_of
from .inputs import FORMATS, InputReader, Names, RequestError, invalid
from .metrics import Metrics
from .pictures import ImageReader
from .refusals import LoadError, NoRoomError, OverloadedError, StoppingError
from .server import Server
from .settings import Settings
from .work import EveryTask, TaskPerRow, Work

log = logging.getLogger("weft.serving")
T = TypeVar("T")

FORM = "multipart/form-data"

SMALL = 100_000
"""Bytes of JSON that are read on the event loop; what is larger is read in a thread."""

MANY = 64
"""Answers that are written on the event loop; more are written in a thread."""


@final
@dataclass(frozen=True)
class Given:
    """What a request brought.

    Args:
        x: (rows, ...) inputs.
        tasks: names; None if none were given.
    """

    x: Tensor
    tasks: tuple[str, ...] | None


@final
class Service:
    """Reads requests, has them run in batches, and turns failures into refusals.

    Args:
        server: runs tasks.
        settings: how to answer.
    """

    def __init__(self, server: Server, settings: Settings) -> None:
        self.server = server
        self.settings = settings
        self.metrics = Metrics(server)
        self.per_row = TaskPerRow(server, mixed=settings.mixed)
        self.every = EveryTask(server)
        self._reader = InputReader(settings.inputs, settings.limits)
        self._images = ImageReader(settings.inputs, settings.limits)
        self._bodies = BodyReader(settings.limits)
        self._threads = ThreadPoolExecutor(2, "weft-read")
        self._reading = 0
        self.batcher: Batcher | None = None
        self.stopping = False
        self.closing = False  # whether connections end with their response

    # ------------------------------------------------------------- life

    def start(self) -> None:
        """Begin to take requests, on the running event loop."""
        settings = self.settings
        self.batcher = Batcher(
            max_batch=settings.max_batch,
            max_delay=settings.max_delay,
            max_queue=settings.max_queue,
            max_queue_bytes=settings.max_queue_bytes,
            observe=self.metrics.batch,
        )
        self.metrics.watch(self.batcher)
        self.batcher.start()

    @property
    def busy(self) -> bool:
        """Whether a request is being read, waits, or runs."""
        return self._reading > 0 or (self.batcher is not None and self.batcher.busy)

    async def stop(self) -> None:
        """Finish what was accepted."""
        self.stopping = True
        if self.batcher is not None:
            await self.batcher.stop()
            counts = self.batcher.accepted, self.batcher.answered
            log.info("Stopped: %d requests accepted, %d answered.", *counts)
        self._threads.shutdown()

    # ------------------------------------------------------------- requests

    async def read(self, request: Request, names: Names) -> Given:
        """The inputs of a request.

        Args:
            request: its body is JSON, a form with images, or an image.
            names: of tasks, whether the body has them.

        Raises:
            RequestError: it cannot be used.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        images = self.settings.inputs.reads_images and names is not Names.PER_ROW
        if not images and names is not Names.PER_ROW and (media in FORMATS or media == FORM):
            raise self._images.refusal()
        taken = ["application/json", *([FORM, *FORMATS] if images else [])]
        if media not in taken:
            message = f"Bodies of type '{media[:80]}' are not taken; send {', '.join(taken)}."
            raise RequestError(415, "unsupported_media_type", message)
        batcher = self.running()
        async with self._bodies.body(request) as body:
            try:
                batcher.check_room()
            except OverloadedError as error:
                raise _overloaded(str(error)) from None
            if self._reading >= self.settings.max_queue:
                raise _overloaded(f"{self._reading} bodies are being read. Try again later.")
            if media == "application/json":
                given = await self._in_thread(len(body), partial(self._from_json, body, names))
            elif media == FORM:
                given = await self._from_form(request, body, names)
            else:
                row = await self._in_thread(None, partial(self._images.rows, [body]))
                given = Given(row, None)
        if len(given.x) > self.settings.max_batch:
            raise invalid(
                f"Found {len(given.x)} rows; up to {self.settings.max_batch} may be sent."
            )
        for name in given.tasks or ():
            self.check_task(name)
        return given

    def _from_json(self, body: bytes, names: Names) -> Given:
        found = self._reader.document(body)
        known = ["inputs"] if names is Names.NONE else ["inputs", "tasks"]
        for key in found:
            if key not in known:
                hint = close_matches(key[:80], known)
                raise invalid(f"The body has a key '{key[:80]}' that is not known.{hint}")
        for key in known if names is Names.PER_ROW else ["inputs"]:
            if key not in found:
                raise invalid(f"The body has no '{key}'.")
        x = self._reader.rows(found["inputs"])
        if "tasks" not in found:
            return Given(x, None)
        tasks = found["tasks"]
        if not isinstance(tasks, list) or not tasks or any(type(t) is not str for t in tasks):
            raise invalid("'tasks' is a list of task names that is not empty.")
        if names is Names.PER_ROW and len(tasks) != len(x):
            raise invalid(f"One task per row: found {len(tasks)} tasks for {len(x)} rows.")
        return Given(x, tuple(tasks))

    async def _from_form(self, request: Request, body: bytes, names: Names) -> Given:
        form = await form_of(request.headers, body, self.settings.max_batch)
        strange = set(form) - ({"image"} if names is Names.NONE else {"image", "tasks"})
        if strange:
            raise invalid(f"The form has a field '{min(strange)[:80]}' that is not known.")
        files = await files_of(form, "image")
        if not files or len(files) != len(form.getlist("image")):
            raise invalid("The form has one or more files in the field 'image'.")
        tasks = form.getlist("tasks")
        if not all(isinstance(task, str) for task in tasks):
            raise invalid("The field 'tasks' of the form is a task's name, not a file.")
        rows = await self._in_thread(None, partial(self._images.rows, files))
        return Given(rows, tuple(map(str, tasks)) or None)

    async def _in_thread(self, size: int | None, work: Callable[[], T]) -> T:
        if size is not None and size <= SMALL:
            return work()
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._reading -= 1

    async def plain(self, answers: Sequence[Sequence[Answer]], top: int | None) -> list[Any]:
        """Answers as JSON has them, in the lists that they came in.

        Args:
            answers: of tasks.
            top: at most so many classes of each.
        """
        size = None if sum(map(len, answers)) > MANY else 0
        work = partial(_all_plain, answers, top)
        return await self._in_thread(size, work)

    def check_task(self, name: str) -> None:
        """Refuse names that are no task's; nothing else becomes of a name that came in a request.

        Raises:
            RequestError: with close matches.
        """
        if name not in self.server:
            names = self.server.task_names
            hint = close_matches(name, names) if len(name) <= 200 and len(names) <= 2000 else ""
            raise RequestError(404, "unknown_task", f"There is no task '{name[:200]}'.{hint}")

    def check_answers(self, rows: int, tasks: int) -> None:
        """Refuse what would be a very long answer.

        Raises:
            RequestError: says what may be asked for.
        """
        if rows * tasks > self.settings.max_answers:
            raise invalid(
                f"{rows:,} rows and {tasks:,} tasks are {rows * tasks:,} answers; up to "
                f"{self.settings.max_answers:,} may be asked for at once. Name fewer tasks, or "
                "send fewer rows."
            )

    async def run(self, request: Request, work: Work, x: Tensor, tasks: Sequence[str]) -> Any:
        """Have a request run in a batch; if its connection ends before, it is dropped.

        Raises:
            RequestError: it did not run.
        """
        running = asyncio.ensure_future(self.running().submit(work, x, tasks))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise RequestError(400, "malformed", "The connection ended before the answer.")
            return await running
        except (RequestError, asyncio.CancelledError):
            raise
        except OverloadedError as error:
            raise _overloaded(str(error)) from None
        except StoppingError as error:
            raise RequestError(503, "stopping", str(error), {"Retry-After": "5"}) from None
        except (DataError, TaskError) as error:
            for name in tasks:
                self.check_task(name)  # it may be gone since the request came
            raise invalid(str(error)) from None
        except (NoRoomError, BankError, torch.OutOfMemoryError, MemoryError) as error:
            raise self._unavailable(error, tasks) from error
        except Exception as error:
            spec = self.settings.inputs
            if spec.shape is not None and spec.dtype == "float32":
                raise  # such inputs were checked: it is not their fault
            log.exception("A request for %s failed.", sorted(set(tasks)))
            raise invalid(f"The base cannot take these inputs: {type(error).__name__}.") from error
        finally:
            running.cancel()
            leaving.cancel()

    def _unavailable(self, error: BaseException, tasks: Sequence[str]) -> RequestError:
        """The refusal for tasks that cannot run now; paths stay in the log."""
        log.error("%s: %s", ", ".join(dict.fromkeys(tasks)), error)
        if isinstance(error, NoRoomError):
            told = str(error)
        elif isinstance(error, LoadError):
            told = f"The task '{error.task}' cannot be loaded at present."
        elif isinstance(error, BankError):
            told = "The bank cannot be read at present."
        else:
            told = "There is not enough memory for this at present."
        return RequestError(503, "task_unavailable", told, {"Retry-After": "30"})

    def running(self) -> Batcher:
        """What runs requests.

        Raises:
            RequestError: nothing does, now or any more.
        """
        if self.batcher is not None and self.batcher.failed:
            message = "Requests are not run any more. The server has to be started again."
            raise RequestError(503, "failed", message, {"Retry-After": "30"})
        if self.batcher is None or self.stopping:
            message = "The server is not taking requests."
            raise RequestError(503, "stopping", message, {"Retry-After": "5"})
        return self.batcher


def _all_plain(answers: Sequence[Sequence[Answer]], top: int | None) -> list[Any]:
    return [[plain_answer(answer, top) for answer in part] for part in answers]


def _overloaded(message: str) -> RequestError:
    return RequestError(503, "overloaded", message, {"Retry-After": "1"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
