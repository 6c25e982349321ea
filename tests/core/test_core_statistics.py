"""Statistics: own ones follow train and eval, frozen ones and foreign buffers never move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import NO_HEAD, conv_net, images, model_of, same, snapshot, vectors
from weft.errors import DataError


def test_frozen_statistics_never_move_in_train_mode() -> None:
    base = conv_net()
    model = model_of(base, weft.linear_probe(base)).train()
    before, x = snapshot(model), images()
    expected = base.eval()(x)
    assert torch.equal(model(x, task="a"), expected)  # normalised by them, not by the batch
    assert torch.equal(model.view("a")(x), expected)
    assert same(snapshot(model), before)


def test_own_statistics_move_for_their_task_only_and_only_in_train_mode() -> None:
    base = conv_net()
    model = model_of(base, weft.scale_bias(base))
    x = images()
    others = snapshot(model.tasks["b"])
    model.eval()(x, task="a")
    assert int(model.tasks["a"].own["1.num_batches_tracked"]) == 0
    model.train()(x, task="a")
    plain = conv_net()
    plain.load_state_dict(base.state_dict())
    plain.train()(x)
    for name, value in plain.state_dict().items():
        if name in model.tasks["a"].own:
            assert torch.equal(model.tasks["a"].own[name], value), name
    assert same(snapshot(model.tasks["b"]), others)


def test_a_partly_owned_normalisation_stays_in_eval_mode() -> None:
    base = conv_net()
    plan = weft.Sharing("half", patches={"1.running_mean": weft.core.patch.Replace()})
    model = model_of(base, plan).train()
    before = snapshot(model)
    model(images(), task="a")
    assert same(snapshot(model), before)


class Averaging(nn.Module):
    """Moves buffers of its own in training mode: in place, by assignment, and a counter."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.always = always
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("assigned", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0))
                self.assigned = 0.9 * self.assigned + x.mean(0)
                self.count += 1
        return self.linear(x - self.mean - self.assigned)


@pytest.mark.parametrize("training", [True, False])
def test_foreign_buffers_never_change_shared_state(training: bool) -> None:
    base = Averaging(always=True)
    user = snapshot(base)
    model = model_of(base).train(training)
    before, x = snapshot(model), vectors()
    first = model(x, task="a")
    model.step({"a": x, "b": vectors()})
    view = model.view("b")
    for run in (lambda: model(x, task="a"), lambda: model(x, task="b"), lambda: view(x)):
        assert torch.equal(run(), first)  # whatever ran before
    assert same(snapshot(model), before)
    assert same(snapshot(base), user)


def test_a_foreign_buffer_follows_the_models_own_buffer() -> None:
    base = Averaging(always=False)
    model = model_of(base).eval()
    x = vectors()
    model(x, task="a")
    with torch.no_grad():
        model.base.mean += 1.0
        base.mean.copy_(model.base.mean)
    assert torch.equal(model(x, task="a"), base.eval()(x))


def test_an_owned_foreign_buffer_moves_with_its_task() -> None:
    base = Averaging(always=False)
    plan = weft.Sharing("owner", patches={"mean": weft.core.patch.Replace()})
    model = model_of(base, plan).train()
    model(vectors(), task="a")
    assert bool(model.tasks["a"].own["mean"].any())
    assert not bool(model.tasks["b"].own["mean"].any())
    assert not bool(model.base.mean.any())


def small_groups() -> weft.MultiTaskModel:
    base = nn.Sequential(conv_net(), nn.Linear(6, 4), nn.BatchNorm1d(4))
    return model_of(base, weft.scale_bias(base)).train()


CALLS: dict[str, Callable[[weft.MultiTaskModel], object]] = {
    "one task": lambda model: model(images(1), task="a"),
    "mixed batch": lambda model: model(images(4), task=["a", "a", "b", "a"]),
    "step": lambda model: model.step({"a": images(4), "b": images(1)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_group_of_one_row_is_refused_before_any_statistics_change(call: str) -> None:
    model = small_groups()
    before = snapshot(model)
    with pytest.raises(DataError, match="group of one row is too small for a batch normal"):
        CALLS[call](model)
    assert same(snapshot(model), before)
    model.eval()(images(1), task="a")
    model.train()(images(4), task=["a", "a", "b", "b"])


def test_one_row_is_fine_where_there_are_more_values_per_channel() -> None:
    base = conv_net()
    model = model_of(base, weft.scale_bias(base)).train()
    model(images(1), task="a")
    assert int(model.tasks["a"].own["1.num_batches_tracked"]) == 1


def test_one_row_is_fine_for_frozen_statistics() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = weft.MultiTaskModel(base, weft.linear_probe(base)).train()
    model.add_task("a", NO_HEAD)
    assert model(vectors(1), task="a").shape == (1, 4)
