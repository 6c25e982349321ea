"""Loaders that are cut or divided keep all else that was asked of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from weft.training.loaders import reseed, share_of_process, slice_loader

DATA = TensorDataset(torch.arange(20.0), torch.arange(20))


def stack(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Another way to make a batch: inputs are ten times as large."""
    x, y = zip(*samples, strict=True)
    return 10 * torch.stack(x), torch.stack(y)


def start(_: int) -> None:
    """What a worker does first."""


def rows(loader: Any) -> list[list[int]]:
    """The rows of each batch."""
    return [y.tolist() for _, y in loader]


def flat(batches: list[list[int]]) -> list[int]:
    """The rows in order."""
    return [row for batch in batches for row in batch]


CHANGES = {
    "part": lambda loader: slice_loader(loader, (0.0, 0.5), 3, "a"),
    "share": lambda loader: share_of_process(loader, 1, 2, "a"),
    "share of a part": lambda loader: share_of_process(CHANGES["part"](loader), 1, 2, "a"),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@every_change
def test_what_makes_batches_is_kept(change: Any) -> None:
    generator = torch.Generator()
    given: DataLoader[Any] = DataLoader(
        DATA,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        collate_fn=stack,
        timeout=5,
        worker_init_fn=start,
        prefetch_factor=3,
        generator=generator,
        multiprocessing_context="spawn",
    )
    made = change(given)
    for name in ("num_workers", "collate_fn", "timeout", "worker_init_fn", "prefetch_factor"):
        assert getattr(made, name) == getattr(given, name) is not None
    assert made.generator is generator
    assert made.multiprocessing_context is given.multiprocessing_context


@every_change
def test_rows_come_through_the_loaders_own_collation(change: Any) -> None:
    for x, y in change(DataLoader(DATA, batch_size=4, collate_fn=stack)):
        assert torch.equal(x, 10.0 * y)


def test_a_part_has_a_fixed_set_of_rows_in_batches_of_the_same_size() -> None:
    first = rows(slice_loader(DataLoader(DATA, batch_size=4), (0.0, 0.5), 3, "a"))
    again = rows(slice_loader(DataLoader(DATA, batch_size=4), (0.0, 0.5), 3, "a"))
    rest = rows(slice_loader(DataLoader(DATA, batch_size=4), (0.5, 1.0), 3, "a"))
    assert first == again
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(flat(first + rest)) == list(range(20))
    cut = slice_loader(DataLoader(DATA, batch_size=4, drop_last=True), (0.0, 0.5), 3, "a")
    assert [len(batch) for batch in rows(cut)] == [4, 4]


@every_change
def test_a_loader_that_shuffles_shuffles_still_and_one_in_order_does_not(change: Any) -> None:
    shuffled = change(DataLoader(DATA, batch_size=4, shuffle=True))
    orders = [flat(rows(shuffled)) for _ in range(6)]
    assert len({tuple(order) for order in orders}) > 1
    plain = change(DataLoader(DATA, batch_size=4))
    assert rows(plain) == rows(plain)


@pytest.mark.parametrize("place", ["loader", "sampler"])
@every_change
def test_a_generator_of_its_own_still_says_the_order(change: Any, place: str) -> None:
    generator = torch.Generator()
    given: DataLoader[Any]
    if place == "loader":
        given = DataLoader(DATA, batch_size=4, shuffle=True, generator=generator)
    else:
        given = DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, generator=generator))
    made = change(given)
    orders = []
    for draws in (0, 5):
        torch.rand(draws)
        reseed(given, 11)
        orders.append(rows(made))
    assert orders[0] == orders[1]


def test_shares_of_processes_are_the_batches() -> None:
    whole = DataLoader(DATA, batch_size=4)
    shares = [rows(share_of_process(whole, index, 2, "a")) for index in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == rows(whole)
