"""Efficient joint training: a fully shared first stage, then each task alone over it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from activations import saved_activations
from weft.errors import ConfigError, PlanError
from weft.joint import efficient_joint, pretrain
from weft.training.history import Epoch


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
    )


def batches(seed: int) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, 6, 6, generator=generator)
    y = torch.randint(3, (32,), generator=generator)
    x[:, seed % 3] += y[:, None, None]
    return DataLoader(TensorDataset(x, y), batch_size=8)


def setting(count: int) -> tuple[dict[str, weft.Task], dict[str, DataLoader[tuple[Tensor, ...]]]]:
    names = [f"t{i}" for i in range(count)]
    return (
        {name: weft.Classification(3) for name in names},
        {name: batches(i) for i, name in enumerate(names)},
    )


QUICK = partial(weft.fit, epochs=2, lr=0.05, progress=False)
FIVE = partial(weft.fit, epochs=5, lr=0.05, progress=False)


def test_pretraining_trains_every_tensor_of_a_copy() -> None:
    base = net()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    trained = pretrain(base, *setting(2), training=QUICK)
    assert type(trained) is nn.Sequential
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert all(not torch.equal(t, before[n]) for n, t in trained.state_dict().items())


def test_the_second_stage_starts_from_the_first_and_leaves_it_alone() -> None:
    tasks, data = setting(2)
    torch.manual_seed(3)
    trained = pretrain(net(), tasks, data, training=QUICK)
    torch.manual_seed(3)
    model = efficient_joint(net(), tasks, data, pretraining=QUICK, training=FIVE)
    assert model.task_names == ("t0", "t1")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.base.state_dict()[name], tensor)
    assert model.sharing.method == "taps"
    assert not torch.equal(model.tasks["t0"].own["1.weight"], trained[1].weight)


def test_tasks_go_to_the_bank_one_by_one(tmp_path: Path) -> None:
    tasks, data = setting(3)
    bank = weft.Bank(tmp_path / "bank")
    resident: list[tuple[str, ...]] = []

    def training(model: weft.MultiTaskModel, given: object) -> weft.History:
        resident.append(model.task_names)
        return FIVE(model, given)  # type: ignore[arg-type]

    model = efficient_joint(
        net(), tasks, data, plan=weft.scale_bias, pretraining=QUICK, training=training, bank=bank
    )
    assert resident == [("t0",), ("t1",), ("t2",)]
    assert model.task_names == ()
    assert bank.tasks() == ("t0", "t1", "t2")
    loaded = bank.load(model.base)
    x = torch.randn(4, 3, 6, 6)
    assert loaded.eval()(x, task="t1").shape == (4, 3)


def _peaks(count: int, folder: Path) -> tuple[int, int]:
    """Bytes of activations at once, and of tensors that a model holds beside heads."""
    held = 0

    def watch(epoch: Epoch) -> None:
        nonlocal held
        heads = {id(p) for t in epoch.model.task_names for p in epoch.model.head(t).parameters()}  # type: ignore[union-attr]
        tensors = [*epoch.model.parameters(), *epoch.model.buffers()]
        held = max(held, sum(t.nbytes for t in tensors if id(t) not in heads))

    with saved_activations() as saved:
        efficient_joint(
            net(),
            *setting(count),
            pretraining=partial(QUICK, one_at_a_time=True, callbacks=[watch]),
            training=partial(FIVE, callbacks=[watch]),
            bank=weft.Bank(folder),
        )
    return saved.peak, held


def test_memory_does_not_grow_with_the_number_of_tasks(tmp_path: Path) -> None:
    assert _peaks(2, tmp_path / "two") == _peaks(6, tmp_path / "six")


def test_plans_that_train_shared_tensors_are_refused_before_any_training() -> None:
    def never(*_: object) -> weft.History:
        raise AssertionError

    with pytest.raises(PlanError, match="over a frozen base"):
        efficient_joint(net(), *setting(2), plan=weft.hard_sharing, pretraining=never)


def test_tasks_and_data_have_the_same_names() -> None:
    tasks, data = setting(2)
    with pytest.raises(ConfigError, match=r"'t1' has no data"):
        pretrain(net(), tasks, {"t0": data["t0"]})
    with pytest.raises(ConfigError, match=r"'t01' has no task\. Close matches: t1"):
        pretrain(net(), tasks, {**data, "t01": data["t0"]})
    with pytest.raises(ConfigError, match="at least one task"):
        pretrain(net(), {}, {})
