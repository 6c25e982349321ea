"""Tasks in memory: loaded on demand, leaving by least recent use, never under a forward."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from serving.banks import add_tasks, disturb, images, make_bank, make_base, size
from weft.bank import Bank
from weft.errors import BankError, DataError, TaskError
from weft.serving import Changes, NoRoomError, Server

NAMES = ("a", "b", "c", "d")


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return all(map(same, found, expected)) and len(found) == len(expected)


def run_together(*works: Callable[[], object]) -> None:
    """Run functions in threads at the same time; an error of one is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_a_server_is_called_like_the_model(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base()), images(4)
    with torch.no_grad():
        for name in NAMES:
            assert torch.equal(server(x, task=name), model(x, task=name))
        assert torch.equal(server(x, task=1), model(x, task="b"))
        mixed = ["c", "a", "c", "b"]
        assert same(server(x, task=mixed), model(x, task=mixed))
        ids = torch.tensor([model.task_names.index(n) for n in mixed])
        assert same(server(x, task=ids), model(x, task=mixed))
        assert same(server(x[:2], task=["a", "a"]), model(x[:2], task=["a", "a"]))
        found = server.predict_all(x)
        assert found.keys() == dict.fromkeys(NAMES).keys()
        every = model.predict_all(x)
        assert all(torch.allclose(found[n], every[n], atol=1e-6) for n in NAMES)
        assert list(server.predict_all(x, tasks=["d", "a"])) == ["d", "a"]
    assert server.task_names == NAMES
    assert not server(x, task="a").requires_grad


def test_unknown_tasks_and_wrong_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path, "flowers", "signs")
    server = Server(bank, make_base())
    for task in ("flower", ["signs", "flower"]):
        with pytest.raises(TaskError, match=r"no task 'flower' among the 2.*Close matches: flow"):
            server(images(2), task=task)
    with pytest.raises(TaskError, match="index 7 is outside"):
        server(images(2), task=7)
    with pytest.raises(DataError, match="found 1 tasks for 2 rows"):
        server(images(2), task=["signs"])
    with pytest.raises(TaskError, match="no task"):
        server.predict_all(images(2), tasks=["signs", "../signs"])
    assert server.resident == ()


def test_another_base_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path)
    other = make_base()
    with torch.no_grad():
        other[0].weight += 1
    with pytest.raises(BankError, match=r"another base.*0.weight"):
        Server(bank, other)
    with pytest.raises(BankError, match="no bank"):
        Server(Bank(tmp_path / "nowhere"), make_base())


def test_tasks_load_at_their_first_use_and_leave_by_least_recent_use(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    cap = size(bank, *NAMES) - 1
    server, x = Server(bank, make_base(), max_bytes=cap), images(1)
    assert (server.resident, server.resident_bytes) == ((), 0)
    for name in ("a", "b", "c"):
        server(x, task=name)
    server(x, task="a")
    assert server.resident == ("b", "c", "a")
    assert server.resident_bytes == size(bank, "a", "b", "c")
    assert torch.equal(server(x, task="d"), model(x, task="d"))
    assert server.resident[-1] == "d"
    assert "b" not in server.resident
    assert "a" in server.resident
    assert (server.loads, server.evictions) == (4, 4 - len(server.resident))


def test_pinned_tasks_never_leave(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    cap = max(size(bank, "b", n) for n in NAMES)
    server, x = Server(bank, make_base(), max_bytes=cap, pinned=["b"]), images(1)
    assert server.resident == ("b",)
    for _ in range(2):
        for name in NAMES:
            assert torch.equal(server(x, task=name), model(x, task=name))
            assert "b" in server.resident
            assert server.resident_bytes <= cap
    every = server.predict_all(x)
    assert all(torch.allclose(every[n], model(x, task=n), atol=1e-6) for n in NAMES)
    with pytest.raises(NoRoomError, match=r"bytes; the server may hold max_bytes="):
        server.pin(*NAMES)
    assert server.pinned == {"b"}
    server.unpin("b")
    for name in ("a", "c", "d", "c"):
        server(x, task=name)
    assert "b" not in server.resident


def test_a_batch_that_cannot_fit_says_how_much_it_needs(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    need = size(bank, *NAMES)
    server, x = Server(bank, make_base(), max_bytes=need - 1), images(4)
    with pytest.raises(NoRoomError, match=f"4 tasks need {need:,} bytes.*max_bytes={need - 1:,}"):
        server(x, task=list(NAMES))
    assert server.resident == ()
    # All tasks of one input, and answers row by row, run in parts instead.
    assert server.predict_all(x).keys() == dict.fromkeys(NAMES).keys()
    answers = server.answers(x, list(NAMES))
    assert [a.task for a in answers] == list(NAMES)
    for i, answer in enumerate(answers):
        expected = model(x[i : i + 1], task=answer.task)[0]
        assert torch.allclose(answer.output, expected, atol=1e-6)
        assert answer.meaning.classes[0] == f"{answer.task} 0"
    assert server.resident_bytes < need
    small = Server(bank, make_base(), max_bytes=10)
    with pytest.raises(NoRoomError, match=r"'c' needs .* bytes; the server may hold max_bytes=10"):
        small(x, task="c")
    with pytest.raises(NoRoomError, match=r"beside .* bytes of pinned tasks"):
        Server(bank, make_base(), max_bytes=size(bank, "c") + 1, pinned=["c"])(x, task="a")


def test_answers_over_all_tasks_are_those_of_each_task(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base()), images(3)
    for row, answers in enumerate(server.all_answers(x, ("d", "a"))):
        assert [a.task for a in answers] == ["d", "a"]
        for answer in answers:
            assert torch.allclose(answer.output, model(x, task=answer.task)[row], atol=1e-6)


def test_eviction_never_changes_an_answer(tmp_path: Path) -> None:
    names = tuple(f"t{i}" for i in range(8))
    bank, model = make_bank(tmp_path, *names)
    cap = 3 * max(size(bank, n) for n in names)
    server = Server(bank, make_base(), max_bytes=cap)
    draw = random.Random(0)
    with torch.no_grad():
        for _ in range(60):
            task: Any = draw.choice(names)
            x = images(draw.randint(1, 3))
            if draw.random() < 0.3:
                task = [draw.choice((task, names[0])) for _ in range(len(x))]
            assert same(server(x, task=task), model(x, task=task))
            assert server.resident_bytes <= cap
    assert server.evictions > 5


def test_threads_get_the_answers_of_one_thread(tmp_path: Path) -> None:
    names = tuple(f"t{i}" for i in range(6))
    bank, model = make_bank(tmp_path, *names)
    cap = 2 * max(size(bank, n) for n in names)
    server = Server(bank, make_base(), max_bytes=cap, pinned=["t1"])
    x = images(2)
    with torch.no_grad():
        expected = {name: model(x, task=name) for name in names}

    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            draw = random.Random(seed)
            for _ in range(40):
                name = draw.choice(names)
                if draw.random() < 0.2:
                    found = server(x, task=[name, name])
                else:
                    found = server(x, task=name)
                assert torch.allclose(found, expected[name], atol=1e-6), name
                assert server.resident_bytes <= cap

        return run

    run_together(*(work(seed) for seed in range(4)))
    assert server.evictions


class Gate:
    """A bank whose reading of one task stops until it is let through."""

    def __init__(self, server: Server, task: str) -> None:
        self.reached, self.open, self.count = threading.Event(), threading.Event(), 0
        inner = server._residency._load

        def load(name: str) -> Any:
            if name == task:
                self.count += 1
                self.reached.set()
                assert self.open.wait(30)
            return inner(name)

        server._residency._load = load


def test_two_threads_load_a_missing_task_once_and_keep_nobody_waiting(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base(), pinned=["a"]), images(1)
    gate = Gate(server, "c")

    def want_c() -> None:
        assert torch.equal(server(x, task="c"), model(x, task="c"))

    def want_a() -> None:
        assert gate.reached.wait(30)
        assert torch.equal(server(x, task="a"), model(x, task="a"))  # while "c" still loads
        assert "c" not in server.resident
        gate.open.set()

    run_together(want_c, want_c, want_a)
    assert gate.count == 1
    assert server.loads == 2


class Slow(nn.Module):
    """A base whose forward stops until it is let through."""

    reached, open = threading.Event(), threading.Event()

    def __init__(self) -> None:
        super().__init__()
        self.net = make_base()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            Slow.reached.set()
            assert Slow.open.wait(30)
        return self.net(x)


def test_a_task_in_use_is_not_evicted_under_its_forward(tmp_path: Path) -> None:
    base = Slow()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=images(1))
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(3))
    disturb(model)
    bank = Bank(tmp_path)
    bank.save(model)
    server = Server(bank, base, max_bytes=size(bank, "a") + 1)
    found: dict[str, Tensor] = {}

    def use_a() -> None:
        found["a"] = server(images(3), task="a")

    def use_b() -> None:
        assert Slow.reached.wait(30)
        waiting = threading.Timer(0.2, Slow.open.set)
        waiting.start()
        assert server.resident == ("a",)
        found["b"] = server(images(1), task="b")  # waits until "a" may leave
        assert Slow.open.is_set()
        assert server.resident == ("b",)

    run_together(use_a, use_b)
    assert len(found["a"]) == 3


def test_damaged_removed_and_changed_bundles_are_reported_and_the_server_goes_on(
    tmp_path: Path,
) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base()), images(1)
    own = bank.path / "tasks" / "c" / "own.safetensors"
    whole = own.read_bytes()
    own.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(BankError, match=r"own.safetensors is not the file that was saved"):
        server(x, task="c")
    with pytest.raises(BankError, match=r"own\.safetensors"):
        server(images(2), task=["a", "c"])
    own.write_bytes(whole)
    assert torch.equal(server(x, task="c"), model(x, task="c"))
    bank.remove("d")
    with pytest.raises(BankError, match="no task 'd'"):
        server(x, task="d")
    document = bank.path / "tasks" / "b" / "bundle.json"
    document.write_text(document.read_text().replace("taps", "tups"))
    with pytest.raises(BankError, match="does not match its checksum"):
        server(x, task="b")
    assert torch.equal(server(x, task="a"), model(x, task="a"))
    assert server.resident_bytes == size(bank, "a", "c")


def test_refresh_finds_new_changed_and_removed_tasks(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base(), pinned=["a"]), images(2)
    before = {name: server(x, task=name) for name in NAMES}
    other = add_tasks(Bank(bank.path), "b", "e", seed=9)
    bank.remove("a")
    assert torch.equal(server(x, task="b"), before["b"]), "in memory it stays what it was"
    with pytest.raises(TaskError):
        server(x, task="e")
    changes = server.refresh()
    assert (changes.added, changes.removed, changes.changed) == (("e",), ("a",), ("b",))
    assert server.task_names == ("b", "c", "d", "e")
    assert torch.equal(server(x, task="b"), other(x, task="b"))
    assert torch.equal(server(x, task="e"), other(x, task="e"))
    assert torch.equal(server(x, task="c"), before["c"])
    assert not torch.equal(server(x, task="b"), before["b"])
    with pytest.raises(TaskError):
        server(x, task="a")
    assert server.pinned == frozenset()
    assert server.refresh().changed == ()
    assert len(model.task_names) == 4


def test_tasks_of_several_shared_states_are_served_side_by_side(tmp_path: Path) -> None:
    base, bank = make_base(), Bank(tmp_path)
    x = images(5)
    expected: dict[str, Tensor] = {}
    for i, names in enumerate((("p", "q"), ("r", "s"))):
        torch.manual_seed(i)
        plan = weft.hard_sharing(base, own="top", fraction=0.3)
        model = weft.MultiTaskModel(base, plan, example=images(1))
        for name in names:
            model.add_task(name, weft.Classification(3))
        disturb(model)
        with torch.no_grad():
            for tensor in model.shared_trainable().values():
                tensor += 0.1 * torch.rand(tensor.shape)
        bank.save(model)
        model.eval()
        expected |= {n: model(x, task=n).detach() for n in names}
    add_tasks(bank, "t")
    server = Server(bank, base)
    mixed = ["r", "p", "s", "t", "q"]
    found = server(x, task=mixed)
    assert isinstance(found, list)  # "t" has another number of classes
    for i, name in enumerate(mixed):
        if name != "t":
            assert torch.allclose(found[i], expected[name][i], atol=1e-6)
    same_heads = server(x[:4], task=["r", "p", "s", "q"])
    assert isinstance(same_heads, Tensor)
    every = server.predict_all(x, tasks=["q", "r"])
    assert all(torch.allclose(every[n], expected[n], atol=1e-6) for n in every)


def test_summaries_and_ledgers_need_no_loading(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path)
    server = Server(bank, make_base())
    summary = server.summary("b")
    assert summary.method == "scale_bias"
    assert summary.classes == ("b 0", "b 1", "b 2")
    assert summary.kind == "classification"
    assert summary.metrics == {"val": {"accuracy": 0.51}}
    assert summary.size == size(bank, "b")
    assert server.ledger("b") == bank.ledger("b")
    assert server.resident == ()
    server.preload("a", "b")
    assert server.resident == ("a", "b")


def test_heads_of_ones_own_are_handed_in(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=images(1))
    head = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    model.add_task("own", weft.Task(head=head, loss=nn.functional.mse_loss))
    model.add_task("none", weft.Task(head=None, loss=nn.functional.mse_loss))
    bank = Bank(tmp_path)
    bank.save(model)
    x = images(2)
    with pytest.raises(BankError, match="heads="):
        Server(bank, base)(x, task="own")
    server = Server(bank, base, heads={"own": nn.Sequential(nn.Flatten(), nn.Linear(24, 2))})
    model.eval()
    assert torch.equal(server(x, task="own"), model(x, task="own"))
    assert torch.equal(server(x, task="none"), model(x, task="none"))
    rows = server(x, task=["own", "none"])
    assert [row.shape for row in rows] == [(2,), (6, 2, 2)]
    task = weft.Task(head=head, loss=nn.functional.mse_loss)
    assert torch.equal(
        Server(bank, base, custom_tasks={"own": task})(x, task="own"), model(x, task="own")
    )


def test_the_tasks_of_a_server_can_be_used_inside_inference_mode(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base()), images(2)
    with torch.inference_mode():
        assert torch.equal(server(x, task="a"), model(x, task="a"))
        assert torch.allclose(server.predict_all(x)["b"], model(x, task="b"), atol=1e-6)
    assert not any(
        t.is_inference()
        for t in server._residency._places["a"].arrived.result().state.own.to_dict().values()
    )


def test_half_precision_halves_own_tensors_and_its_error_is_measured(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=images(1))
    for name in ("a", "huge"):
        model.add_task(name, weft.Classification(3))
    disturb(model)
    with torch.no_grad():
        model.tasks["huge"].own["1.running_var"].fill_(1e6)  # outside float16
    bank = Bank(tmp_path)
    bank.save(model)
    model.eval()
    server, x = Server(bank, base, half=True), images(3)
    with torch.no_grad():
        exact = model(x, task="a")
    found = server(x, task="a")
    assert found.dtype == torch.float32
    error = float((found - exact).abs().max() / exact.abs().max())
    assert 0 < error < 1e-2
    assert server.half_error("a", x) == pytest.approx(error, rel=1e-3)
    led = bank.ledger("a")
    assert server.resident_bytes < led.head_bytes + 0.6 * led.own_bytes
    server(x, task="huge")
    own = server._residency._places["huge"].arrived.result().state.own
    assert own["1.running_var"].dtype == torch.float32
    assert own["1.weight"].dtype == torch.float16
    assert torch.allclose(server(x, task=["a", "huge", "a"])[0], exact[0], atol=1e-2)
    server.predict_all(x)


def test_a_bank_without_tasks_serves_none_until_there_are_some(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path, "a")
    bank.remove("a")
    server = Server(bank, make_base())
    assert server.task_names == ()
    assert server.predict_all(images(1)) == {}
    model = add_tasks(bank, "z")
    server.refresh()
    x = images(1)
    assert torch.equal(server(x, task="z"), model(x, task="z"))


def test_an_interrupted_load_keeps_nobody_waiting(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base()), images(2)
    gate = Gate(server, "b")
    inner = server._residency._load

    def interrupted(name: str) -> Any:
        found = inner(name)
        if name == "b":
            raise KeyboardInterrupt
        return found

    server._residency._load = interrupted
    waited: list[str] = []

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            server(x, task=["b", "c"])

    def second() -> None:
        assert gate.reached.wait(30)
        threading.Timer(0.1, gate.open.set).start()
        with pytest.raises(BankError, match="was interrupted"):
            server(x[:1], task="c")
        waited.append("c")

    run_together(first, second)
    assert waited == ["c"]
    assert server.resident_bytes == 0
    server._residency._load = inner
    assert torch.equal(server(x, task="b"), model(x, task="b"))


def test_a_stream_of_calls_does_not_starve_one_that_needs_room(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path, "a", "b", "c", "d")
    server, x = Server(bank, make_base(), max_bytes=size(bank, "a", "b", "c", "d") - 1), images(1)
    server.preload("a", "b", "c")
    done = threading.Event()

    def stream() -> None:
        while not done.is_set():
            server(x, task="a")

    def needs_room() -> None:
        for _ in range(5):
            server(x, task="d")
            server(images(2), task=["b", "c"])
        done.set()

    run_together(stream, stream, needs_room)


def test_a_bank_that_has_vanished_takes_nothing_with_it(tmp_path: Path) -> None:
    bank, model = make_bank(tmp_path)
    server, x = Server(bank, make_base(), pinned=["a"]), images(1)
    for gone in (bank.path, bank.path / "bank.json"):
        gone.rename(tmp_path / "elsewhere")
        with pytest.raises(BankError, match="no bank"):
            server.refresh()
        assert server.task_names == NAMES
        assert server.pinned == {"a"}
        assert torch.equal(server(x, task="a"), model(x, task="a"))
        (tmp_path / "elsewhere").rename(gone)
    assert server.refresh() == Changes((), (), ())


def test_refreshes_at_the_same_time_agree(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path)
    server = Server(bank, make_base())
    add_tasks(bank, "e", "f")
    found: list[Any] = []
    run_together(*[lambda: found.append(server.refresh())] * 6)
    assert sorted(changes.added for changes in found) == [()] * 5 + [("e", "f")]


def too_wide(folder: Path) -> tuple[Bank, Any]:
    """Tasks of which none fits into the range of half precision."""
    base = make_base()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=images(2))
    for name in NAMES:
        model.add_task(name, weft.Classification(3))
    disturb(model)
    with torch.no_grad():
        for name in NAMES:
            for tensor in model.tasks[name].own.values():
                if tensor.is_floating_point():
                    tensor.view(-1)[0] = 1e6
    bank = Bank(folder / "bank")
    bank.save(model)
    return bank, bank.load(base).eval()


def test_tasks_that_half_precision_cannot_hold_are_served_in_smaller_groups(
    tmp_path: Path,
) -> None:
    bank, model = too_wide(tmp_path)
    one, x = size(bank, "a"), images(4)
    for cap in (one + one // 2, 2 * one + one // 2):
        for ask in range(3):
            server = Server(bank, make_base(), half=True, max_bytes=cap)
            assert server.summary("a").half_size < 0.7 * one
            if ask == 0:
                found = server.predict_all(x)
                assert all(torch.equal(found[n], model(x, task=n)) for n in NAMES)
            elif ask == 1:
                for i, answer in enumerate(server.answers(x, list("abcd"))):
                    expected = model(x[i : i + 1], task=NAMES[i])[0]
                    assert torch.allclose(answer.output, expected, rtol=1e-4)
            else:
                with pytest.raises(NoRoomError, match="4 tasks need"):
                    server(x, task=list("abcd"))
                assert torch.equal(server(x, task="b"), model(x, task="b"))
            assert server.resident_bytes <= cap


def test_a_task_that_is_larger_than_all_room_says_what_it_needs(tmp_path: Path) -> None:
    bank, _ = too_wide(tmp_path)
    one = size(bank, "a")
    server = Server(bank, make_base(), half=True, max_bytes=one - 1)
    message = rf"'a' needs {one:,} bytes; the server may hold max_bytes={one - 1:,}\. Raise max"
    for ask in (lambda: server(images(1), task="a"), lambda: server.predict_all(images(1))) * 2:
        with pytest.raises(NoRoomError, match=message):
            ask()
    assert server.resident_bytes == 0
    base = make_base()  # saved again, it is smaller
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=images(2))
    model.add_task("a", weft.Classification(3))
    bank.save(model)
    server.refresh()
    assert server(images(1), task="a").shape == (1, 3)


def shared_tasks(bank: Bank, seed: int, *names: str) -> None:
    """Save tasks that were trained together on shared tensors of their own."""
    base = make_base()
    model = weft.MultiTaskModel(base, weft.hard_sharing(base, own="top"), example=images(2))
    for name in names:
        model.add_task(name, weft.Classification(3))
    torch.manual_seed(seed)
    disturb(model)
    with torch.no_grad():
        for tensor in model.shared.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape)
    bank.save(model)


def test_shared_states_leave_with_the_last_task_that_refers_to_them(tmp_path: Path) -> None:
    bank, x = Bank(tmp_path / "bank"), images(2)
    shared_tasks(bank, 0, "a", "b")
    server = Server(bank, make_base())
    server.predict_all(x)
    with server._residency.lease("a"):
        for seed in range(1, 4):
            shared_tasks(bank, seed, "a")
            assert server.refresh().changed == ("a",)
            server(x, task="a")
            states = {server.bank.info(name)["shared"]["sha256"] for name in "ab"}
            assert set(server._loader._models) - {None} == states
    shared_tasks(bank, 9, "a", "b")
    server.refresh()
    assert not set(server._loader._models) - {None}
    expected = bank.load(make_base()).eval()
    found = server.predict_all(x)
    with torch.no_grad():
        assert all(torch.allclose(found[n], expected(x, task=n), atol=1e-6) for n in "ab")
