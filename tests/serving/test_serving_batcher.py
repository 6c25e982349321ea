"""Requests wait together and are answered apart."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.banks import images, make_bank, make_base
from weft.errors import DataError, WeftError
from weft.serving import (
    Batcher,
    EveryTask,
    Job,
    OverloadedError,
    Server,
    StoppingError,
    TaskPerRow,
    Work,
)


class Echo(Work):
    """Answers each job with its own content; fails for the task "bad"; can be held up."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[Job]] = []
        self.open = threading.Event()
        self.open.set()

    def kind(self, tasks: tuple[str, ...]) -> Hashable:  # noqa: ARG002
        return None

    def run(self, jobs: Sequence[Job]) -> Sequence[Any]:
        self.batches.append(list(jobs))
        assert self.open.wait(30)
        time.sleep(self.seconds)
        assert len({job.x.shape[1:] for job in jobs}) == 1
        if any("bad" in job.tasks for job in jobs):
            raise ValueError("bad")
        return [(job.x.sum().item(), job.tasks) for job in jobs]


def running(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def rows(count: int = 1, size: int = 2) -> Tensor:
    return torch.randn(count, size)


def test_every_answer_goes_to_its_own_request_under_random_concurrency() -> None:
    async def work() -> None:
        batcher, echo, draw = Batcher(max_batch=8, max_delay=2, max_queue=400), Echo(), None
        draw = random.Random(0)
        batcher.start()

        async def client(number: int) -> None:
            for _ in range(10):
                await asyncio.sleep(draw.random() * 0.01)
                x = rows(draw.randint(1, 3), draw.choice((2, 5)))
                tasks = tuple(f"{number} {i}" for i in range(len(x)))
                if draw.random() < 0.1:
                    with pytest.raises(ValueError, match="bad"):
                        await batcher.submit(echo, x, ("bad",))
                    continue
                if draw.random() < 0.1:
                    pending = asyncio.ensure_future(batcher.submit(echo, x, tasks))
                    await asyncio.sleep(0)
                    pending.cancel()
                    continue
                assert await batcher.submit(echo, x, tasks) == (x.sum().item(), tasks)

        await asyncio.gather(*(client(i) for i in range(30)))
        await batcher.stop()
        assert batcher.waiting == 0
        assert max(len(b) for b in echo.batches) > 2
        assert all(sum(len(j.x) for j in b) <= 8 for b in echo.batches)

    running(work())


def test_requests_wait_for_a_full_batch_but_not_longer_than_the_delay() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=4, max_delay=80), Echo()
        batcher.start()
        start = time.monotonic()
        await asyncio.gather(*(batcher.submit(echo, rows(2), "ab") for _ in range(2)))
        assert time.monotonic() - start < 0.07, "a full batch waits for nobody"
        start = time.monotonic()
        await batcher.submit(echo, rows(), "a")
        assert 0.07 < time.monotonic() - start < 1
        assert [len(b) for b in echo.batches] == [2, 1]
        await batcher.stop()

    running(work())


def test_inputs_of_different_shape_or_type_never_meet() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=4, max_delay=5), Echo()
        batcher.start()
        given = [rows(), rows(size=3), rows().double(), rows(), rows(size=3)]
        await asyncio.gather(*(batcher.submit(echo, x, "a") for x in given))
        assert sorted(len(b) for b in echo.batches) == [1, 2, 2]
        await batcher.stop()

    running(work())


def test_one_failing_request_fails_alone() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=8, max_delay=5), Echo()
        batcher.start()
        tasks = ["a", "bad", "c", "bad", "e"]
        answers = await asyncio.gather(
            *(batcher.submit(echo, rows(), (name,)) for name in tasks), return_exceptions=True
        )
        assert [isinstance(a, ValueError) for a in answers] == [n == "bad" for n in tasks]
        assert [a[1] for a in answers if isinstance(a, tuple)] == [("a",), ("c",), ("e",)]
        await batcher.stop()

    running(work())


def test_a_full_queue_refuses_and_cancelled_requests_never_run() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=1, max_delay=0, max_queue=3), Echo()
        echo.open.clear()
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(echo, rows(), ("first",)))
        while not echo.batches:
            await asyncio.sleep(0.001)
        waiting = [asyncio.ensure_future(batcher.submit(echo, rows(), (n,))) for n in "abc"]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(OverloadedError, match="3 requests are waiting"):
            await batcher.submit(echo, rows(), ("d",))
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 2
        late = asyncio.ensure_future(batcher.submit(echo, rows(), ("late",)))
        await asyncio.sleep(0)
        first.cancel()  # it runs already: nobody waits for the answer
        echo.open.set()
        await asyncio.gather(waiting[0], waiting[2], late)
        assert [b[0].tasks[0] for b in echo.batches] == ["first", "a", "c", "late"]
        await batcher.stop()

    running(work())


def test_stopping_finishes_what_was_accepted_and_takes_no_more() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=2, max_delay=1000), Echo(0.01)
        batcher.start()
        accepted = [
            asyncio.ensure_future(batcher.submit(echo, rows(), (str(i),))) for i in range(7)
        ]
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await batcher.submit(echo, rows(), ("late",))
        answers = await asyncio.gather(*accepted)
        assert [a[1][0] for a in answers] == [str(i) for i in range(7)]
        await stop

    running(work())


def test_too_many_rows_are_refused() -> None:
    async def work() -> None:
        batcher = Batcher(max_batch=4)
        with pytest.raises(DataError, match="Found 5 rows; a request may have up to 4"):
            await batcher.submit(Echo(), rows(5), "aaaaa")

    running(work())


def test_the_event_loop_goes_on_while_the_model_runs() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_delay=0), Echo(0.2)
        batcher.start()
        pending = asyncio.ensure_future(batcher.submit(echo, rows(), "a"))
        ticks = 0
        while not pending.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 5
        await batcher.stop()

    running(work())


@pytest.mark.parametrize("mixed", [True, False])
def test_requests_to_a_server_get_the_eager_answers(mixed: bool, tmp_path: Path) -> None:
    names = tuple(f"t{i}" for i in range(6))
    bank, model = make_bank(tmp_path, *names)
    server = Server(bank, make_base())
    sizes: list[tuple[int, int]] = []

    async def work() -> None:
        batcher = Batcher(max_batch=16, max_delay=3, observe=lambda r, t: sizes.append((r, t)))
        per_row, every = TaskPerRow(server, mixed=mixed), EveryTask(server)
        batcher.start()
        draw = random.Random(1)

        async def client() -> None:
            for _ in range(8):
                x = images(draw.randint(1, 2))
                if draw.random() < 0.2:
                    found = await batcher.submit(every, x, names[:3])
                    for row, answers in enumerate(found):
                        for answer in answers:
                            expected = model(x, task=answer.task)[row]
                            assert torch.allclose(answer.output, expected, atol=1e-5)
                    continue
                name = draw.choice(names)
                found = await batcher.submit(per_row, x, [name] * len(x))
                expected = model(x, task=name)
                for row, answer in enumerate(found):
                    assert answer.task == name
                    assert torch.allclose(answer.output, expected[row], atol=1e-5)

        await asyncio.gather(*(client() for _ in range(12)))
        await batcher.stop()

    running(work())
    if mixed:
        assert max(tasks for _, tasks in sizes) > 2


def test_a_damaged_bundle_fails_its_own_requests_only(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    (bank.path / "tasks" / "c" / "own.safetensors").write_bytes(b"")
    server = Server(bank, make_base(), max_bytes=10**6)

    async def work() -> None:
        batcher = Batcher(max_batch=8, max_delay=5)
        per_row = TaskPerRow(server)
        batcher.start()
        x = images(1)
        answers = await asyncio.gather(
            *(batcher.submit(per_row, x, [n]) for n in "abcd"), return_exceptions=True
        )
        assert isinstance(answers[2], WeftError)
        for name, answer in zip("abd", [answers[0], answers[1], answers[3]], strict=True):
            assert torch.allclose(answer[0].output, model(x, task=name)[0], atol=1e-5)
        await batcher.stop()

    running(work())


class Raising(Work):
    """Raises what it is told to for the task "bad"."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def kind(self, tasks: tuple[str, ...]) -> Hashable:  # noqa: ARG002
        return None

    def run(self, jobs: Sequence[Job]) -> Sequence[Any]:
        if any("bad" in job.tasks for job in jobs):
            raise self.error
        return [job.tasks for job in jobs]


@pytest.mark.parametrize(
    "error", [StopIteration("x"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()]
)
def test_whatever_a_base_raises_fails_its_request_and_no_other(error: BaseException) -> None:
    async def work() -> None:
        batcher, raising = Batcher(max_batch=4, max_delay=20), Raising(error)
        batcher.start()
        asked = [batcher.submit(raising, rows(), (name,)) for name in ("good", "bad", "good")]
        good, bad, also = await asyncio.wait_for(
            asyncio.gather(*asked, return_exceptions=True), timeout=10
        )
        assert good == also == ("good",)
        assert isinstance(bad, RuntimeError)
        assert type(error).__name__ in str(bad)
        assert await batcher.submit(raising, rows(), ("later",)) == ("later",)
        assert not batcher.failed
        await batcher.stop()
        assert batcher.accepted == batcher.answered == 4

    running(work())


def test_a_batcher_whose_worker_has_ended_says_so() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=1, max_delay=0), Echo()
        echo.open.clear()
        batcher.start()
        asked = [asyncio.ensure_future(batcher.submit(echo, rows(), ("a",))) for _ in range(2)]
        while not echo.batches:
            await asyncio.sleep(0.01)
        assert batcher.busy
        assert batcher._worker is not None
        batcher._worker.cancel()
        for each in asked:
            with pytest.raises(StoppingError, match="gave up"):
                await asyncio.wait_for(each, timeout=10)
        assert batcher.failed
        with pytest.raises(StoppingError, match="not run any more"):
            await asyncio.wait_for(batcher.submit(echo, rows(), ("a",)), timeout=10)
        echo.open.set()

    running(work())


def test_bytes_that_wait_are_bounded() -> None:
    async def work() -> None:
        batcher, echo = Batcher(max_batch=8, max_delay=50, max_queue_bytes=100), Echo()
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(echo, rows(8, 50), ("a",)))  # alone, it may
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="1,600 bytes of inputs are waiting"):
            await batcher.submit(echo, rows(1, 1), ("a",))
        await first
        small = [asyncio.ensure_future(batcher.submit(echo, rows(1, 10), ("a",))) for _ in range(3)]
        await asyncio.sleep(0)
        small[0].cancel()
        done = await asyncio.gather(*small, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert isinstance(done[2], OverloadedError)
        assert await batcher.submit(echo, rows(1, 25), ("a",))
        await batcher.stop()

    running(work())
