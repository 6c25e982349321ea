"""Which tasks are in memory: loaded on demand, leaving by least recent use, never while in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import final

from weft.core.model import MultiTaskModel
from weft.core.state import TaskState
from weft.errors import BankError

from .refusals import LoadError, NoRoomError


@final
@dataclass(frozen=True)
class Resident:
    """A task in memory.

    Args:
        state: what a model holds for it.
        model: one without tasks, of the shared state that it runs on.
        size: bytes of its own tensors and its head.
        stamp: of the bundle that it was loaded from.
    """

    state: TaskState
    model: MultiTaskModel
    size: int
    stamp: tuple[int, ...]


class _LargerError(NoRoomError):
    """A task is larger than was expected; what it takes is known now."""


@final
@dataclass
class _Place:
    """Room for one task, reserved before it is loaded."""

    size: int
    uses: int = 0
    gone: bool = False
    arrived: Future[Resident] = field(default_factory=Future)


@final
class Residency:
    """Tasks in memory, within a number of bytes; safe under threads.

    Who needs tasks leases them, all at once or none: a leased task does not leave. Missing tasks
    are loaded by the first thread that needs them, without keeping others from tasks that are
    there. Where leased tasks leave too little room, threads wait in the order of their coming.

    Args:
        load: reads a task.
        estimate: how many bytes a task will take; what it took when it was loaded counts more.
        max_bytes: for all tasks together; None for no bound.
    """

    def __init__(
        self,
        load: Callable[[str], Resident],
        estimate: Callable[[str], int],
        max_bytes: int | None,
    ) -> None:
        self._load = load
        self._estimate = estimate
        self._max = max_bytes
        self._places: OrderedDict[str, _Place] = OrderedDict()  # by last use
        self._sizes: dict[str, int] = {}
        self._pinned: frozenset[str] = frozenset()
        self._pinning = threading.Lock()
        self._turn = threading.Lock()  # who waits for room is not overtaken
        self._changed = threading.Condition()
        self._bytes = 0
        self.loads = 0
        self.evictions = 0

    # ---------------------------------------------------------------- looking

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in memory, the most recently used last."""
        with self._changed:
            return tuple(n for n, p in self._places.items() if _is_there(p))

    @property
    def size(self) -> int:
        """Bytes in use or reserved."""
        return self._bytes

    @property
    def pinned(self) -> frozenset[str]:
        """Tasks that do not leave."""
        return self._pinned

    def stamps(self) -> dict[str, tuple[int, ...]]:
        """By task in memory, the stamp of the bundle that it was loaded from."""
        with self._changed:
            found = {n: p.arrived for n, p in self._places.items() if _is_there(p)}
        return {name: arrived.result().stamp for name, arrived in found.items()}

    # ---------------------------------------------------------------- leasing

    def leases(self, names: Iterable[str]) -> Iterator[dict[str, Resident]]:
        """Lease tasks part by part, in their order, in each as many as fit together.

        Args:
            names: the tasks; repetitions do not matter.

        Yields:
            The tasks of a part, leased until the next one is asked for.

        Raises:
            NoRoomError: a task does not fit.
            BankError: a task cannot be loaded.
        """
        waiting = list(dict.fromkeys(names))
        while waiting:
            part = self._fitting(waiting)
            with ExitStack() as held:
                try:
                    residents = held.enter_context(self.lease(part))
                except NoRoomError:  # if they turned out to be larger, fewer of them may fit
                    fewer = self._fitting(waiting)
                    if len(fewer) >= len(part):
                        raise
                    residents = held.enter_context(self.lease(fewer))
                yield residents
            waiting = waiting[len(residents) :]

    def _fitting(self, names: Sequence[str]) -> list[str]:
        """The first of these tasks, as many as fit together; at least one."""
        if self._max is None:
            return list(names)
        with self._changed:
            room = self._max - self._pinned_size(())
            pinned = self._pinned.intersection(self._places)
        found: list[str] = []
        for name in names:
            room -= 0 if name in pinned else self._size_of(name)
            if found and room < 0:
                break
            found.append(name)
        return found

    @contextmanager
    def lease(self, names: Iterable[str]) -> Iterator[dict[str, Resident]]:
        """Have tasks in memory for a ``with`` block.

        Args:
            names: the tasks; repetitions do not matter.

        Raises:
            NoRoomError: they do not fit together.
            BankError: a task cannot be loaded.
        """
        wanted = list(dict.fromkeys(names))
        try:
            places, residents = self._arrived(wanted)
        except _LargerError:  # with what they take, they have room, or an error that says it all
            places, residents = self._arrived(wanted)
        try:
            yield residents
        finally:
            self._release(places)

    def pin(self, names: Iterable[str]) -> None:
        """Load tasks and keep them.

        Raises:
            NoRoomError: the pinned tasks do not fit together.
            BankError: a task cannot be loaded.
        """
        with self._pinning:
            every = self._pinned.union(names)
            with self.lease(every), self._changed:
                self._pinned = every

    def unpin(self, names: Iterable[str]) -> None:
        """Let tasks leave again."""
        with self._pinning, self._changed:
            self._pinned = self._pinned.difference(names)

    def drop(self, names: Iterable[str]) -> None:
        """Load these tasks anew at their next use; forwards under way end with what they have.

        What absent tasks took when they were in memory is forgotten as well.
        """
        with self._changed:
            for name in names:
                place = self._places.pop(name, None)
                if place is not None:
                    self._let_go(place)
            self._sizes = {n: s for n, s in self._sizes.items() if n in self._places}
            self._changed.notify_all()

    # ---------------------------------------------------------------- inside

    def _arrived(self, wanted: Sequence[str]) -> tuple[dict[str, _Place], dict[str, Resident]]:
        places, missing = self._reserve(wanted)
        try:
            self._fill({name: places[name] for name in missing})
            return places, {name: place.arrived.result() for name, place in places.items()}
        except BaseException:
            self._release(places)
            raise

    def _release(self, places: Mapping[str, _Place]) -> None:
        with self._changed:
            for place in places.values():
                place.uses -= 1
                if place.gone and not place.uses:
                    self._bytes -= place.size
            self._changed.notify_all()

    def _reserve(self, wanted: Sequence[str]) -> tuple[dict[str, _Place], list[str]]:
        sizes = {name: self._size_of(name) for name in wanted}  # reads, so not under the lock
        with self._turn, self._changed:
            while not self._made_room(sizes):
                self._changed.wait()
            missing = [name for name in wanted if name not in self._places]
            for name in missing:
                self._places[name] = _Place(sizes[name])
                self._bytes += sizes[name]
            places = {name: self._places[name] for name in wanted}
            for name, place in places.items():
                place.uses += 1
                self._places.move_to_end(name)
            return places, missing

    def _size_of(self, name: str) -> int:
        size = self._sizes.get(name)
        if size is None:
            with _named(name):
                size = self._sizes[name] = self._estimate(name)
        return size

    def _made_room(self, wanted: Mapping[str, int]) -> bool:
        """Whether the missing ones among these tasks have room now; others may have left for it.

        Raises:
            NoRoomError: they can never have it.
        """
        if self._max is None:
            return True
        there = sum(self._places[n].size for n in wanted if n in self._places)
        missing = sum(size for n, size in wanted.items() if n not in self._places)
        pinned = self._pinned_size(wanted)
        if there + missing + pinned > self._max:
            beside = f" beside {pinned:,} bytes of pinned tasks" if pinned else ""
            advice = "Ask for fewer tasks at once, or raise" if len(wanted) > 1 else "Raise"
            raise NoRoomError(
                f"{_counted(wanted)} {there + missing:,} bytes{beside}; the server may hold "
                f"max_bytes={self._max:,}. {advice} max_bytes."
            )
        return self._free(self._bytes + missing - self._max, wanted)

    def _pinned_size(self, without: Collection[str]) -> int:
        others = self._pinned.difference(without)
        return sum(self._places[n].size for n in others if n in self._places)

    def _free(self, size: int, kept: Collection[str]) -> bool:
        """Whether so many bytes could be freed; tasks leave only if it is enough."""
        leaving = []
        for name, place in self._places.items():
            if size <= 0:
                break
            if not place.uses and name not in self._pinned and name not in kept:
                leaving.append(name)
                size -= place.size
        if size > 0:
            return False
        for name in leaving:
            self._let_go(self._places.pop(name))
            self.evictions += 1
        return True

    def _let_go(self, place: _Place) -> None:
        place.gone = True
        if not place.uses:
            self._bytes -= place.size

    def _fill(self, places: Mapping[str, _Place]) -> None:
        """Load tasks into their places; whoever waits for one gets it, or the error."""
        try:
            for name, place in places.items():
                try:
                    with _named(name):
                        resident = self._load(name)
                    with self._changed:
                        self._settle(name, place, resident.size)
                except Exception as error:
                    self._fail(name, place, error)
                else:
                    place.arrived.set_result(resident)
        finally:
            for name, place in places.items():
                if not place.arrived.done():  # Ctrl+C, for instance
                    why = f"Loading '{name}' was interrupted. Ask for it again."
                    self._fail(name, place, LoadError(name, why))

    def _fail(self, name: str, place: _Place, error: Exception) -> None:
        with self._changed:
            if self._places.get(name) is place:
                del self._places[name]
            if not isinstance(error, _LargerError):
                self._sizes.pop(name, None)
            place.gone = True  # its room is free when the last one that waits has gone
        place.arrived.set_exception(error)

    def _settle(self, name: str, place: _Place, size: int) -> None:
        """Take the true size of a task in place of the estimate.

        Raises:
            NoRoomError: it is larger, and there is no room for the rest at once.
        """
        self._sizes[name] = size
        more = size - place.size
        limit = self._bytes + more if self._max is None else self._max
        if more > 0 and not self._free(self._bytes + more - limit, (name,)):
            raise _LargerError(
                f"'{name}' takes {size:,} bytes, {more:,} more than expected, and tasks in use "
                f"leave no room for them within max_bytes={limit:,}. Try again."
            )
        self._bytes += more
        place.size = size
        self.loads += 1


@contextmanager
def _named(task: str) -> Iterator[None]:
    """Say of which task the bank complains."""
    try:
        yield
    except BankError as error:
        raise LoadError(task, str(error)) from error


def _is_there(place: _Place) -> bool:
    return place.arrived.done() and place.arrived.exception() is None


def _counted(names: Collection[str]) -> str:
    if len(names) == 1:
        return f"'{next(iter(names))}' needs"
    return f"These {len(names)} tasks need"
