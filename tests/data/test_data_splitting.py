"""Splits: shares by class, reproducible, disjoint."""

from collections.abc import Iterator

import pytest
import torch

from weft.data import ArrayData, TaskData, stratified_split
from weft.data.sets import Batch, size
from weft.errors import DataError


def test_every_class_keeps_its_share_and_no_row_is_lost() -> None:
    targets = torch.arange(3).repeat_interleave(torch.tensor([100, 40, 20]))
    rows = stratified_split(targets, val=0.1, test=0.25, seed=0)
    assert torch.bincount(targets[rows["val"]]).tolist() == [10, 4, 2]
    assert torch.bincount(targets[rows["test"]]).tolist() == [25, 10, 5]
    together = torch.cat(list(rows.values()))
    assert together.sort().values.equal(torch.arange(160))


def test_small_classes_reach_every_split_and_single_samples_train() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    rows = stratified_split(targets, val=0.1, test=0.1, seed=0)
    assert {name: targets[r].tolist() for name, r in rows.items()} == {
        "train": [0, 1, 2],
        "val": [0, 1],
        "test": [0],
    }


def test_the_seed_alone_decides() -> None:
    targets = torch.randint(0, 4, (200,))
    first = stratified_split(targets, val=0.2, test=0.2, seed=3)
    state = torch.get_rng_state()
    again = stratified_split(targets, val=0.2, test=0.2, seed=3)
    other = stratified_split(targets, val=0.2, test=0.2, seed=4)
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["train"].equal(other["train"])
    assert torch.get_rng_state().equal(state)


def test_numbers_are_split_at_random_and_a_share_of_zero_has_no_entry() -> None:
    rows = stratified_split(torch.randn(50), val=0.2, test=0, seed=0)
    assert {name: len(r) for name, r in rows.items()} == {"val": 10, "train": 40}


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.2)])
def test_impossible_shares_are_refused(val: float, test: float) -> None:
    with pytest.raises(DataError, match="sum below 1"):
        stratified_split(torch.zeros(4), val=val, test=test, seed=0)


def test_gathered_rows_are_the_single_rows() -> None:
    inputs = {"ids": torch.arange(12).view(6, 2), "mask": torch.ones(6, 2)}
    data = ArrayData(inputs, torch.arange(6), rows=torch.tensor([5, 1, 3]))
    batch = data.__getitems__([2, 0])
    assert len(data) == 3
    assert batch.targets.tolist() == [3, 5]
    assert isinstance(batch.inputs, dict)
    assert batch.inputs["ids"].tolist() == [[6, 7], [10, 11]]
    x, y = data[0]
    assert isinstance(x, dict)
    assert (x["ids"].tolist(), int(y)) == ([10, 11], 5)


def test_a_batch_reads_as_a_list_of_samples() -> None:
    batch = Batch(torch.arange(6).view(3, 2), torch.tensor([7, 8, 9]))
    assert [int(y) for _, y in batch] == [7, 8, 9]
    assert isinstance(batch[1:], Batch)
    with pytest.raises(IndexError, match="row 3"):
        batch[3]


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(DataError, match="3 rows and targets 2"):
        ArrayData(torch.zeros(3, 2), torch.zeros(2))


def test_a_stream_is_no_map_style_data_set() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(DataError, match="Stream is not a map-style data set"):
        size(Stream())


def test_description_names_sizes_shape_and_classes() -> None:
    data = ArrayData(torch.zeros(4, 3, 2, 2), torch.zeros(4))
    task = TaskData(data, None, data, ("a", "b"), (3, 2, 2))
    assert task.describe() == "4 train, 4 test; 3x2x2; 2 classes"
