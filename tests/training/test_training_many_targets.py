"""One input, many targets: all tasks train on the same rows, read and moved once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from training_nets import (
    assert_same_bits,
    dense_net,
    everything,
    in_order,
    model_of,
    vectors,
)

import weft
from weft.errors import ConfigError, DataError
from weft.training.batches import ManyTargets, Reader, TargetsOf, sources, to_device
from weft.training.loaders import loaders_by_task, share_of_process, slice_loader


class Rows(Dataset[Any]):
    """Vectors that hold their own number, with a class for each of two tasks."""

    def __init__(self, count: int) -> None:
        self.x, self.y = vectors(count, 3, 1).tensors
        self.x[:, -1] = torch.arange(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {"a": self.y[index], "b": 2 - self.y[index]}


def loader(count: int = 32, *, shuffle: bool = True) -> DataLoader[Any]:
    """Batches of eight rows with targets for tasks a and b."""
    return DataLoader(Rows(count), batch_size=8, shuffle=shuffle)


def model(plan: Any = weft.full_finetune) -> weft.MultiTaskModel:
    """A model with tasks a and b."""
    base = dense_net()
    return model_of(base, plan(base))


def rows_of(x: Tensor) -> list[int]:
    """The numbers of the rows of a batch."""
    return [int(number) for number in x[:, -1]]


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.reads = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.reads += 1
            yield batch


# ------------------------------------------------------------------------------ the same as apart


@pytest.mark.parametrize("plan", [weft.full_finetune, weft.taps, weft.hard_sharing])
def test_fitting_is_that_of_a_loader_per_task_with_the_same_rows(plan: Any) -> None:
    batches = list(loader(shuffle=False))
    one, apart = model(plan), model(plan)
    options: dict[str, Any] = {"epochs": 6, "lr": 0.05, "progress": False}
    data = {t: [(x, targets[t]) for x, targets in batches] for t in "ab"}
    first = weft.fit(one, (batches, batches), **options)
    second = weft.fit(apart, {t: (d, d) for t, d in data.items()}, **options)
    assert_same_bits(everything(one), everything(apart))
    for task in "ab":
        assert [r["val"] for r in first[task]] == [r["val"] for r in second[task]]
        assert [r["loss"] for r in first[task]] == [r["loss"] for r in second[task]]


def test_evaluating_is_that_of_a_loader_per_task_and_reads_once() -> None:
    batches = list(loader(shuffle=False))
    once = Counted(batches)
    data = {t: [(x, targets[t]) for x, targets in batches] for t in "ab"}
    chosen = model()
    assert weft.evaluate(chosen, once) == weft.evaluate(chosen, data)
    assert once.reads == len(batches)


def test_training_and_validation_read_once_for_all_tasks() -> None:
    train, val = Counted(list(loader())), Counted(list(loader(16)))
    weft.fit(model(), (train, val), epochs=3, progress=False)
    assert (train.reads, val.reads) == (3 * 4, 3 * 2)


def test_validation_is_optional_and_seen_by_every_task() -> None:
    for data in (loader(), (loader(), None)):
        assert weft.fit(model(), data, epochs=1, progress=False)["a"][0]["val"] == {}
    history = weft.fit(model(), (loader(), loader(16)), epochs=1, progress=False)
    assert all("accuracy" in history[task][0]["val"] for task in "ab")


def test_a_shuffled_run_repeats_with_its_seed_and_goes_on_from_its_checkpoint(
    tmp_path: Any,
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(epoch: Any) -> None:
        if epoch.number == 1:
            raise Interrupted

    whole, stopped = model(weft.taps), model(weft.taps)
    options: dict[str, Any] = {"epochs": 5, "lr": 0.05, "progress": False}
    weft.fit(whole, loader(), **options)
    with pytest.raises(Interrupted):
        weft.fit(stopped, loader(), **options, checkpoint=tmp_path, callbacks=[interrupt])
    weft.fit(stopped, loader(), **options, checkpoint=tmp_path)
    assert_same_bits(everything(stopped), everything(whole))


def test_a_loader_with_its_own_generator_repeats_with_the_seed() -> None:
    results = []
    for state in (1, 2):
        chosen, generator = model(), torch.Generator().manual_seed(state)
        data = DataLoader(Rows(32), batch_size=8, shuffle=True, generator=generator)
        weft.fit(chosen, data, epochs=2, progress=False)
        results.append(everything(chosen))
    assert_same_bits(*results)


def test_heads_are_sized_by_the_first_batch_which_is_read_once() -> None:
    base = dense_net()
    waiting = weft.MultiTaskModel(base, weft.linear_probe(base))
    for task in "ab":
        waiting.add_task(task, weft.Classification(3))
    batches = Counted(list(loader()))
    weft.fit(waiting, batches, epochs=1, steps=1, progress=False)
    assert all(waiting.head(task) is not None for task in "ab")
    assert batches.reads == 2  # one for the heads, one for the step


def test_targets_may_stand_under_labels() -> None:
    pairs = list(loader(shuffle=False))
    named = [{"input": x, "labels": targets} for x, targets in pairs]
    one, other = model(), model()
    expected = weft.evaluate(one, pairs)
    assert weft.evaluate(one, [(x, t) for x, t in pairs]) == expected
    # A dict of inputs goes to the base by name, and a Sequential calls its input so.
    assert weft.evaluate(other, named) == expected


# ---------------------------------------------------------------------------- one input, once


def test_every_step_has_one_input_for_all_tasks() -> None:
    data = loaders_by_task(loader(), ("a", "b"))
    seen = []
    for step in Reader({"a": 1, "b": 2}).together(data, 8):
        assert list(step) == ["a", "b"]
        assert step["a"][0] is step["b"][0]
        assert torch.equal(step["b"][1], 2 - step["a"][1])
        seen += rows_of(step["a"][0])
    assert sorted(seen) == sorted(2 * list(range(32)))  # two passes, each over all rows
    assert seen[:32] != seen[32:]


def test_a_tensor_that_occurs_twice_is_moved_once() -> None:
    x, y, z = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    moved = to_device({"a": ({"x": x}, y), "b": ({"x": x}, z)}, torch.device("meta"))
    assert moved["a"][0]["x"] is moved["b"][0]["x"]
    assert moved["a"][1] is not moved["b"][1]
    assert moved["a"][0]["x"].device.type == "meta"


def test_parts_of_the_data_keep_tasks_together_and_are_disjoint() -> None:
    data = loaders_by_task(loader(40), ("a", "b"))
    seen: dict[tuple[float, float], set[int]] = {}
    for part in ((0.0, 0.8), (0.8, 1.0)):
        cut = {task: slice_loader(of_task, part, 7, task) for task, of_task in data.items()}
        assert len(sources(cut)) == 1
        seen[part] = set()
        reader = Reader({"a": 1, "b": 2})
        for step in reader.together(cut, len(cut["a"])):  # type: ignore[arg-type]
            assert step["a"][0] is step["b"][0]
            seen[part] |= set(rows_of(step["a"][0]))
    assert seen[0.0, 0.8] | seen[0.8, 1.0] == set(range(40))
    assert not seen[0.0, 0.8] & seen[0.8, 1.0]


def test_tasks_on_different_parts_keep_their_order() -> None:
    def with_c(x: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {**targets, "c": targets["a"]}

    data: Dataset[Any] = [with_c(*row) for row in Rows(40)]  # type: ignore[assignment]
    names = ("a", "b", "c")
    loaders = loaders_by_task(DataLoader(data, batch_size=8), names)
    parts = {"a": (0.0, 0.5), "b": (0.5, 1.0), "c": (0.0, 0.5)}
    cut = {task: slice_loader(loaders[task], part, 7, task) for task, part in parts.items()}
    assert [source.tasks for source in sources(cut)] == [["a", "c"], ["b"]]
    step = next(Reader({"a": 1, "b": 2, "c": 3}).together(cut, 1))
    assert list(step) == ["a", "b", "c"]
    assert step["a"][0] is step["c"][0]
    assert not set(rows_of(step["a"][0])) & set(rows_of(step["b"][0]))


def test_processes_divide_every_batch_and_keep_tasks_together() -> None:
    whole = loaders_by_task(loader(shuffle=False), ("a", "b"))
    shares = [
        {task: share_of_process(of_task, index, 2, task) for task, of_task in whole.items()}
        for index in (0, 1)
    ]
    seeds = {"a": 1, "b": 2}
    steps = zip(*(Reader(seeds).together(share, 4) for share in shares), strict=True)
    for one, two, all_rows in zip(*zip(*steps, strict=True), whole["a"], strict=True):
        assert one["a"][0] is one["b"][0]
        assert rows_of(one["a"][0]) + rows_of(two["a"][0]) == rows_of(all_rows[0])


def test_one_tasks_part_reads_as_pairs() -> None:
    batches = list(loader(shuffle=False))
    part = TargetsOf(ManyTargets(batches, ("a", "b")), "b")
    assert len(part) == len(batches)
    for (x, y), (inputs, targets) in zip(part, batches, strict=True):
        assert x is inputs
        assert y is targets["b"]


def test_the_same_list_for_two_tasks_is_still_read_for_each() -> None:
    batches = in_order(vectors(16, 3, 1))
    assert len(sources({"a": batches, "b": batches})) == 2


# ----------------------------------------------------------------------------------- refusals

X, Y = torch.zeros(2, 5), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("batch", "complaint"),
    [
        ((X, {"a": Y}), "no targets for 'b'; found 'a'"),
        ((X, {"a": Y, "bb": Y}), "no targets for 'b'; found 'a', 'bb'.*Close matches: bb"),
        ((X, {"a": Y, "b": Y, "aa": Y}), "targets for 'aa', which is no task.*Close matches: a"),
        ((X, Y), r"batches \(x, \{task: y\}\), found targets of type Tensor"),
        ((X, Y, Y), "A batch of 'a', 'b' is a pair.*found tuple of 3"),
    ],
)
def test_batches_without_the_right_targets_are_refused_by_name(batch: Any, complaint: str) -> None:
    chosen = model()
    before = everything(chosen)
    with pytest.raises(DataError, match=complaint):
        weft.fit(chosen, [batch], epochs=1, progress=False)
    with pytest.raises(DataError, match=complaint):
        weft.evaluate(chosen, [batch])
    assert_same_bits(everything(chosen), before)


def test_targets_that_are_missing_later_leave_the_last_complete_epoch() -> None:
    chosen = model()
    before = everything(chosen)
    good = (torch.randn(2, 5), {"a": Y, "b": Y})
    with pytest.raises(DataError, match="no targets for 'b'"):
        weft.fit(chosen, [good, (X, {"a": Y})], epochs=1, progress=False)
    assert_same_bits(everything(chosen), before)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ((loader(), loader(), loader()), r"a pair \(train, val\), found a tuple of 3"),
        ([], "The data of 'a' is empty"),
        ((loader(), []), "The data of 'a' is empty"),
        (iter([(X, {"a": Y, "b": Y})]), "an iterator, which can be read only once"),
        (7, "is batches, for instance a DataLoader; found int"),
    ],
)
def test_data_that_cannot_be_used_is_refused(data: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        weft.fit(model(), data, epochs=1, progress=False)


@pytest.mark.parametrize("data", [(loader(), loader()), 7])
def test_evaluating_takes_one_loader(data: Any) -> None:
    with pytest.raises(DataError, match="Expected one loader, or a dict with one for each task"):
        weft.evaluate(model(), data)


def test_a_model_without_tasks_has_nothing_to_fit() -> None:
    base = dense_net()
    empty = weft.MultiTaskModel(base, weft.linear_probe(base))
    with pytest.raises(ConfigError, match="data for at least one task"):
        weft.fit(empty, loader(), progress=False)
