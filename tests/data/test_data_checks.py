"""Checks before training."""

import torch
from torch.utils.data import TensorDataset

from weft.data import ArrayData, TaskData, check


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count).float().unsqueeze(1).repeat(1, 3)


def task(**changes: ArrayData) -> TaskData:
    splits = {
        "train": ArrayData(rows(6), torch.arange(6) % 2),
        "val": ArrayData(rows(2, 10), torch.tensor([0, 1])),
        "test": ArrayData(rows(2, 20), torch.tensor([0, 1])),
    } | changes
    return TaskData(**splits, classes=("a", "b"))


def test_sound_data_has_no_problems() -> None:
    state = torch.get_rng_state()
    assert check(task()) == []
    assert torch.get_rng_state().equal(state)


def test_classes_without_samples_are_named() -> None:
    val = ArrayData(rows(2, 10), torch.tensor([1, 1]))
    assert check(task(val=val)) == ["1 of 2 classes have no sample in val: a."]


def test_inputs_that_occur_twice_are_found() -> None:
    test = ArrayData(torch.cat([rows(1, 20), rows(1, 11), rows(1, 4)]), torch.tensor([0, 1, 0]))
    assert check(task(test=test)) == [
        "1 of 3 inputs of test also occur in train (samples of test = train: 2 = 4).",
        "1 of 3 inputs of test also occur in val (samples of test = val: 1 = 1).",
    ]


def test_inputs_and_targets_that_are_not_finite_are_found() -> None:
    broken = rows(6)
    broken[1, 2], broken[4, 0] = torch.nan, torch.inf
    targets = torch.tensor([0, torch.nan, 1, 2, 3, 4])
    problems = check(TaskData(ArrayData(broken, targets), task().val))
    assert problems == [
        "2 of 6 inputs of train hold NaN or infinity (samples 1, 4).",
        "1 targets of train are NaN or infinite.",
    ]


def test_places_are_counted_from_the_start_of_the_split() -> None:
    many = rows(1200)
    many[700, 0] = torch.nan
    (problem,) = check(TaskData(ArrayData(many, torch.zeros(1200)), full_val()))
    assert problem == "1 of 1200 inputs of train hold NaN or infinity (samples 700)."


def test_labels_outside_the_classes_are_found() -> None:
    val = ArrayData(rows(4, 10), torch.tensor([0, 1, 2, -1]))
    assert check(task(val=val)) == ["2 labels of val are outside 0..1: -1, 2."]


def test_ignored_pixels_of_dense_targets_are_no_labels() -> None:
    dense = torch.tensor([[[0, 1], [-100, -100]]])
    train = ArrayData(torch.zeros(1, 3, 2, 2), dense)
    assert check(task(train=train)) == []


def test_splits_that_are_missing_or_empty_are_named() -> None:
    empty = ArrayData(rows(0), torch.zeros(0, dtype=torch.int64))
    assert check(task(val=empty)) == ["The val split is empty."]
    full = task()
    assert "no val split" in check(TaskData(full.train, classes=full.classes))[0]
    assert "no train split" in check(TaskData(None, test=full.test, classes=full.classes))[0]


def test_other_data_sets_are_read_in_full() -> None:
    train = TensorDataset(rows(1000), torch.zeros(1000, dtype=torch.int64))
    test = TensorDataset(rows(1, 999), torch.zeros(1, dtype=torch.int64))
    (problem,) = check(TaskData(train, full_val(), test))
    assert problem.endswith("(samples of test = train: 0 = 999).")


def full_val() -> ArrayData:
    return ArrayData(rows(1, 5000), torch.zeros(1, dtype=torch.int64))


def test_every_tensor_of_an_input_counts() -> None:
    def tokens(mask: int) -> ArrayData:
        inputs = {"ids": torch.ones(1, 2), "mask": torch.full((1, 2), mask)}
        return ArrayData(inputs, torch.zeros(1))

    assert check(TaskData(tokens(1), tokens(2))) == []
    assert len(check(TaskData(tokens(1), tokens(1)))) == 1
