"""The folder of a bank: which bundles and shared states there are, and how they get there.

bank.json                      format, the base's fingerprint, a mark per tensor of it
tasks/<task>/bundle.json       everything about the task that is not a tensor
tasks/<task>/own.safetensors   what it owns
tasks/<task>/head.safetensors  its head
shared/<hash>.safetensors      what the tasks of one model trained or added together
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.core.task import check_task_name
from weft.errors import BankError, TaskError, close_matches
from weft.files import make_folder, put_file, write_file

from . import files
from .bundles import BUNDLE, read_entry
from .documents import read_document, render
from .fingerprint import Marks, difference, fingerprint, merge
from .shared import SharedState
from .tensors import read_tensors

BANK, TASKS, SHARED = "bank.json", "tasks", "shared"
_ADDED = re.compile(rb'^ "added": "([^"]*)",$', re.MULTILINE)
_OURS = {BANK, TASKS, SHARED, files.LOCK, files.STAGING}


class Store:
    """The files of one bank.

    Args:
        root: its folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bank: tuple[tuple[int, ...], dict[str, Any]] | None = None

    # ---------------------------------------------------------------- reading

    def names(self) -> list[str]:
        """The tasks that have a bundle, by the alphabet."""
        return [name for name, problem in self.entries() if not problem]

    def entries(self) -> Iterator[tuple[str, str]]:
        """Everything among the bundles: a name, and what is wrong with it or ""."""
        place = self.root / TASKS
        self._refuse_link(place)
        if not place.is_dir():
            return
        found: dict[str, str] = {}
        for entry in os.scandir(place):
            name = entry.name
            if name.startswith("."):
                interrupted = name.endswith(".old") and not (place / name[1:-4]).exists()
                if not interrupted:
                    continue
                name = name[1:-4]
            found[name] = self._problem(name, entry)
        yield from sorted(found.items())

    def _problem(self, name: str, entry: os.DirEntry[str]) -> str:
        if entry.is_symlink():
            return f"{entry.path} is a symbolic link, which a bank does not follow"
        if not entry.is_dir(follow_symlinks=False):
            return f"{entry.path} is no folder of a task"
        try:
            check_task_name(name, {})
        except TaskError as error:
            return str(error)
        return ""

    def place(self, task: str) -> Path:
        """The folder of a task's bundle.

        Raises:
            BankError: there is none.
        """
        self.bank()
        try:
            check_task_name(task, {})
        except TaskError as error:
            raise BankError(str(error)) from None
        self._refuse_link(self.root / TASKS)
        place = files.current(self.root / TASKS / task)
        self._refuse_link(place)
        if not place.is_dir():
            names = self.names()
            have = ", ".join(names[:20]) + (", …" if len(names) > 20 else "") or "none yet"
            hint = close_matches(task, names)
            raise BankError(f"There is no task '{task}' in {self.root}. Tasks: {have}.{hint}")
        return place

    def added(self, task: str) -> str:
        """When a task was first saved, or "" if that cannot be read.

        Looks at the beginning of the bundle only, unchecked: to list a bank is not to read it.
        """
        place = files.current(self.root / TASKS / task)
        try:
            with files.opened(place / BUNDLE) as file:
                found = _ADDED.search(file.read(1 << 11))
        except (BankError, OSError):
            return ""
        return found[1].decode(errors="replace") if found else ""

    def stamp(self, task: str) -> tuple[int, ...]:
        """What changes whenever a task is saved again."""
        return _stamp(self.place(task) / BUNDLE)

    def bank(self) -> dict[str, Any]:
        """The content of ``bank.json``.

        Raises:
            BankError: the folder is no bank.
        """
        path = self.root / BANK
        if not self.root.is_dir():
            raise BankError(f"There is no bank at {self.root}. Make one: bank.save(model).")
        if not path.exists():
            raise BankError(
                f"{self.root} is no bank: it has no {BANK}. Check the path. If it was a bank, save "
                "one of its tasks into it again: the other bundles stay."
            )
        stamp = _stamp(path)
        if self._bank is None or self._bank[0] != stamp:
            self._bank = (stamp, read_document(path, "bank"))
        return self._bank[1]

    @property
    def is_new(self) -> bool:
        """Whether nothing has been saved here yet, perhaps because the first save was killed."""
        if not self.root.exists():
            return True
        inside = set(os.listdir(self.root)) if self.root.is_dir() else {""}
        return inside <= _OURS - {BANK} and not self.names()

    def base(self) -> dict[str, Any]:
        """What the bank knows about its base."""
        base: dict[str, Any] = self.bank()["base"]
        return base

    def marks(self) -> Marks:
        """What the bank knows about its base, by tensor."""
        marks: Marks = self.base()["tensors"]
        return marks

    def shared_path(self, name: str) -> Path:
        """The file of a shared state."""
        self._refuse_link(self.root / SHARED)
        return self.root / SHARED / f"{name}.safetensors"

    def read_shared(self, shared: Mapping[str, Any], *, verify: bool) -> dict[str, Tensor]:
        """The tensors of a shared state.

        Args:
            shared: what a bundle says about it.
            verify: whether to compare the hash.

        Raises:
            BankError: it is missing or damaged.
        """
        return read_tensors(self.shared_path(shared["sha256"]), shared, verify=verify)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep writers from renaming for a ``with`` block."""
        with files.reported("read the bank", self.root):
            with files.locked(self.root, exclusive=False):
                yield

    # ---------------------------------------------------------------- writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep everybody else out for a ``with`` block."""
        with files.locked(self.root, exclusive=True):
            yield

    @contextmanager
    def preparing(self, action: str) -> Iterator[Path]:
        """A staging folder for a ``with`` block, in a bank that is made if there is none.

        Raises:
            BankError: the folder cannot be written to, or is something else than a bank.
        """
        with files.reported(action, self.root):
            if self.root.exists() and not self.root.is_dir():
                raise BankError(f"{self.root} is a file; a bank is a folder. Use another path.")
            make_folder(self.root)
            strangers = sorted(set(os.listdir(self.root)) - _OURS)
            if strangers and not (self.root / BANK).exists():
                raise BankError(
                    f"{self.root} is no bank and not empty (it has {strangers[0]!r}). "
                    "Use an empty or a new folder."
                )
            for folder in (TASKS, SHARED):
                self._refuse_link(self.root / folder)
                make_folder(self.root / folder)
            with files.staging(self.root) as place:
                yield place

    def staged_bundle(self, staged: Path) -> Path:
        """The folder in a staging folder in which to write a bundle before `publish`."""
        place = staged / "bundle"
        make_folder(place)
        return place

    def publish(
        self, staged: Path, task: str, base: Mapping[str, Any], shared: SharedState | None
    ) -> None:
        """Rename a prepared bundle into place, after what it depends on.

        Args:
            staged: the staging folder with the bundle.
            task: the task's name.
            base: what ``bank.json`` says about the bundle's base.
            shared: the shared state that the bundle depends on.

        Raises:
            BankError: the bank belongs to another base, or has a name that differs by case only.
        """
        with self.writing():
            self._settle_base(staged, base)
            for name in self.names():
                if name != task and folded(name) == folded(task):
                    raise BankError(
                        f"The bank has a task '{name}', and '{task}' differs from it by case or "
                        "accents' encoding only: some file systems cannot hold both. Rename one."
                    )
            place = self.root / TASKS / task
            self._refuse_link(place)
            if place.exists() and not place.is_dir():
                raise BankError(f"{place} is in the way and no folder of a task. Move it away.")
            if shared is not None and not self._has(shared):
                write_file(staged / "shared", shared.data)
                put_file(staged / "shared", self.shared_path(shared.hash))
            files.put_folder(staged / "bundle", place)

    def _has(self, shared: SharedState) -> bool:
        path = self.shared_path(shared.hash)
        return path.is_file() and path.stat().st_size == len(shared.data)

    def check_base(self, marks: Marks) -> None:
        """Refuse a base that is not the bank's, before anything is written.

        Raises:
            BankError: says what differs.
        """
        if (self.root / BANK).exists():
            wrong = difference(self.marks(), marks)
            if wrong:
                raise BankError(
                    f"{self.root} belongs to another base than this model's: {wrong}. "
                    "A bank has one base: save into another folder."
                )

    def _settle_base(self, staged: Path, base: Mapping[str, Any]) -> None:
        """Write ``bank.json`` if there is none, or if more values of the base are known now."""
        self.check_base(base["tensors"])
        entry = dict(base)
        if (self.root / BANK).exists():
            known = self.marks()
            marks = merge(known, base["tensors"])
            if marks == known:
                return
            entry |= {"tensors": marks, "fingerprint": fingerprint(marks)}
        write_file(staged / BANK, render("bank", {"base": entry}))
        put_file(staged / BANK, self.root / BANK)

    def remove(self, task: str) -> None:
        """Drop a task's bundle."""
        with self.preparing(f"remove '{task}'") as staged:
            with self.writing():
                self.place(task)
                files.drop_folder(self.root / TASKS / task, staged)

    def prune(self) -> list[str]:
        """Drop the shared states that no bundle names; none while a bundle cannot be read."""
        with self.preparing("prune"), self.writing():
            needed = set()
            for name in self.names():
                try:
                    shared = read_entry(self.place(name), name)["shared"]
                    needed.add(shared and shared["sha256"])
                except (BankError, KeyError, TypeError):
                    return []
            dropped = []
            for path in sorted((self.root / SHARED).glob("*.safetensors")):
                if path.stem not in needed:
                    path.unlink()
                    dropped.append(path.stem)
            return dropped

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink():
            raise BankError(
                f"{path} is a symbolic link, which a bank does not follow. "
                "Put the folder itself there."
            )


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.lstat()
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def folded(name: str) -> str:
    """A name as file systems compare it that ignore case and the encoding of accents."""
    return unicodedata.normalize("NFC", name).casefold()
