"""A save that is killed, fails or races leaves old state or new, whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weft
from bank.banking import (
    Faulty,
    files_under,
    full_disk,
    images,
    make_base,
    make_model,
    outputs,
)
from weft.bank import Bank, files
from weft.errors import BankError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and locks of POSIX")

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; the number of the signal that ended it, 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def kill() -> None:
    """Die at once, as by a power cut of the process."""
    os.kill(os.getpid(), signal.SIGKILL)


def use(system: Faulty, patch: pytest.MonkeyPatch) -> None:
    """Let everything that writes a bank's files go through this operating system."""
    for module in (files, weft.files):
        patch.setattr(module, "os", system)


def changes_of(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many changes of the file system it takes."""
    with monkeypatch.context() as patch:
        counter = Faulty(0, kill)
        use(counter, patch)
        work()
    return counter.count


def whole(
    bank: Bank, allowed: list[tuple[int, ...]], models: dict[int, weft.MultiTaskModel]
) -> None:
    """The bank holds tasks a and b of one of the allowed pairs of models, and nothing broken.

    Args:
        bank: the bank.
        allowed: seeds of the models that a and b may be of.
        models: by seed.
    """
    seeds = []
    for name in ("a", "b"):
        loaded = bank.load(make_base(), name)
        seed = loaded.tasks[name].facts["seed"]
        assert torch.equal(outputs(loaded, X)[name], outputs(models[seed], X)[name])
        seeds.append(seed)
    assert tuple(seeds) in allowed
    assert not bank.verify(make_base())


@pytest.mark.parametrize(("method", "stride"), [("taps", 3), ("hard_sharing", 1)])
def test_law8_a_save_killed_at_any_change_leaves_old_or_new(
    method: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {seed: make_model(make_base(), method=method, seed=seed) for seed in (1, 2)}
    bank = Bank(tmp_path / "bank")
    bank.save(models[1])
    steps = changes_of(lambda: bank.save(models[2]), monkeypatch)
    assert steps > 30
    states = set()
    for at in (*range(1, steps, stride), steps):
        bank.save(models[1])
        bank.prune()  # or the shared state of the second model is there already

        def work(at: int = at) -> None:
            use(Faulty(at, kill), pytest.MonkeyPatch())
            bank.save(models[2])

        assert in_child(work) == signal.SIGKILL
        allowed = [(1, 1), (2, 1), (2, 2)]
        whole(Bank(bank.path), allowed, models)
        states.add(tuple(Bank(bank.path).info(t)["facts"]["seed"] for t in ("a", "b")))
    assert states == {(1, 1), (2, 1), (2, 2)}
    bank.save(models[2])
    whole(bank, [(2, 2)], models)
    # The next save has cleared what the killed ones left behind.
    assert not list((bank.path / files.STAGING).iterdir())
    assert sorted(p.name for p in (bank.path / "tasks").iterdir()) == ["a", "b"]


def test_law8_a_first_save_killed_at_any_change_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(make_base(), "a", "b", seed=1)
    steps = changes_of(lambda: Bank(tmp_path / "count").save(model), monkeypatch)
    for at in range(1, steps + 1, 3):
        bank = Bank(tmp_path / f"bank{at}")

        def work(at: int = at, bank: Bank = bank) -> None:
            use(Faulty(at, kill), pytest.MonkeyPatch())
            bank.save(model)

        assert in_child(work) == signal.SIGKILL
        assert set(bank.tasks()) <= {"a", "b"}
        bank.save(model)
        whole(Bank(bank.path), [(1, 1)], {1: model})


def test_law8_a_removal_killed_at_any_change_removes_or_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(make_base(), method="hard_sharing", seed=1)
    bank = Bank(tmp_path / "bank")
    bank.save(model)
    steps = changes_of(lambda: bank.remove("a"), monkeypatch)
    for at in range(1, steps + 1):
        bank.save(model)

        def work(at: int = at) -> None:
            use(Faulty(at, kill), pytest.MonkeyPatch())
            bank.remove("a")

        assert in_child(work) == signal.SIGKILL
        fresh = Bank(bank.path)
        assert set(fresh.tasks()) in ({"a", "b"}, {"b"})
        assert not fresh.verify(make_base())


def test_law8_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "hard_sharing"
    models = {seed: make_model(make_base(), method=method, seed=seed) for seed in (1, 2)}
    bank = Bank(tmp_path / "bank")
    bank.save(models[1])
    steps = changes_of(lambda: bank.save(models[2], "a"), monkeypatch)
    failures = 0
    for at in range(1, steps + 1):
        bank.save(models[1])
        with monkeypatch.context() as patch:
            use(Faulty(at, full_disk), patch)
            try:
                bank.save(models[2], "a")
            except BankError as error:
                failures += 1
                assert "disk (or the quota) is full. Free some space" in str(error)  # noqa: PT017
                assert "unharmed" in str(error)  # noqa: PT017
        whole(Bank(bank.path), [(1, 1), (2, 1)], models)
        assert not list((bank.path / files.STAGING).iterdir())
    assert failures > 10


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank(tmp_path / "bank")
    model = make_model(make_base())

    def refuse() -> None:
        raise PermissionError(13, "Permission denied", str(bank.path))

    use(Faulty(1, refuse), monkeypatch)
    with pytest.raises(BankError, match=r"Cannot save 'a': at .*bank, it is not permitted. Check"):
        bank.save(model)
    monkeypatch.undo()
    assert not bank.path.exists()
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(BankError, match="not permitted"):
            bank.save(model)
        tmp_path.chmod(0o700)


def test_a_bank_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank")
    bank.save(make_model(make_base(), seed=1))
    before = files_under(bank.path)
    (bank.path / ".lock").unlink()
    bank.load(make_base())
    assert not bank.verify(make_base())
    assert bank.tasks() == ("a", "b")
    assert not (bank.path / ".lock").exists()
    assert files_under(bank.path) == before


def test_law8_saves_killed_at_random_moments_leave_old_or_new(tmp_path: Path) -> None:
    models = {seed: make_model(make_base(), seed=seed) for seed in (1, 2)}
    bank = Bank(tmp_path / "bank")
    bank.save(models[1])

    def work() -> None:
        while True:
            for seed in (2, 1):
                bank.save(models[seed])

    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(0.01 + 0.08 * float(torch.rand((), generator=generator)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        whole(Bank(bank.path), [(i, j) for i in (1, 2) for j in (1, 2)], models)


def test_processes_that_save_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    names = [f"task {i}" for i in range(6)]
    model = make_model(make_base(), *names, method="hard_sharing", seed=1)
    path = tmp_path / "bank"
    children = []
    for i in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for name in (*names[i::3], *names[i::3]):
                    Bank(path).save(model, name)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    bank = Bank(path)
    assert set(bank.tasks()) == set(names)
    assert not bank.verify(make_base())
    x = images()
    found, expected = outputs(bank.load(make_base()), x), outputs(model, x)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_readers_see_old_or_new_while_a_task_is_saved_again_and_again(tmp_path: Path) -> None:
    models = {seed: make_model(make_base(), seed=seed) for seed in (1, 2)}
    bank = Bank(tmp_path / "bank")
    bank.save(models[1])
    stop = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            while not stop.is_set():
                for seed in (2, 1):
                    bank.save(models[seed])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(10):
            whole(Bank(bank.path), [(i, j) for i in (1, 2) for j in (1, 2)], models)
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_a_lock_ends_with_its_process_and_a_held_one_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank(tmp_path / "bank")
    model = make_model(make_base(), seed=1)
    bank.save(model)

    def hold_and_die() -> None:
        with files.locked(bank.path, exclusive=True):
            kill()

    assert in_child(hold_and_die) == signal.SIGKILL
    bank.save(model)  # nothing waits for the dead

    monkeypatch.setattr(files, "PATIENCE", 0.02)
    with files.locked(bank.path, exclusive=True):
        with pytest.raises(BankError, match=r"the lock ends with it. Deleting the file does not"):
            bank.save(model)
        with pytest.raises(BankError, match="has held the lock"):
            bank.load(make_base())
    bank.load(make_base())
