"""Copies, files, loading, moving: an ordinary module that never touches the user's base."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import NO_HEAD, conv_net, images, mlp, model_of, same, snapshot, vectors
from weft.core.state import escape, unescape

NAMES = ("v1.0", "a~b", "x~0y", "~1.~", "Größe 7", "a-b_c")


@pytest.mark.parametrize("key", [*NAMES, "a/b", "~/.", "", "forward", "layer.weight:tuned"])
def test_escaping_is_reversible_and_has_no_dots(key: str) -> None:
    assert unescape(escape(key)) == key
    assert "." not in escape(key)


def trained(base: nn.Module, *names: str) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, weft.taps(base), example=images())
    for name in names:
        model.add_task(name, weft.Classification(3))
    with torch.no_grad():
        for parameter in model.tasks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "assign"])
def test_round_trips_keep_every_bit_and_share_nothing(how: str) -> None:
    base = conv_net()
    model = trained(base, *NAMES)
    x = images()
    with torch.no_grad():
        model.view("v1.0")(x)  # structures exist and must not come along
        expected = model.predict_all(x)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = trained(conv_net(), *NAMES)
        again.load_state_dict(model.state_dict(), assign=how == "assign")
        if how == "assign":
            model = copy.deepcopy(model)  # assigned tensors are shared on purpose
    assert again.task_names == NAMES
    for name, output in again.predict_all(x).items():
        assert torch.equal(output, expected[name])
    before = snapshot(model)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again.train().step({n: images() for n in NAMES}).outputs["a~b"].sum().backward()
    optimizer.step()
    assert same(snapshot(model), before)


def test_state_dict_names_are_readable_and_structures_leave_no_trace() -> None:
    model = trained(conv_net(), "v1.0")
    names = set(model.state_dict())
    model(images(), task="v1.0")
    view = model.view("v1.0")
    assert set(model.state_dict()) == names
    assert {n for n in names if n.startswith("base.")} == {f"base.{n}" for n in view.names}
    assert "tasks.v1/0.own.0/weight:tuned" in names
    assert "tasks.v1/0.head.linear.weight" in names
    assert not any(".view" in n or "structure" in n for n in names)
    assert len(pickle.dumps(model)) < 60_000


def test_loading_never_touches_the_users_base() -> None:
    base = conv_net()
    before = snapshot(base)
    model = trained(base, "a")
    other = trained(conv_net(), "a")
    x = images()
    model.load_state_dict(other.state_dict())
    assert same(snapshot(base), before)
    assert torch.equal(model(x, task="a"), other(x, task="a"))
    outer = nn.ModuleDict({"inside": trained(base, "a")})
    outer.load_state_dict({f"inside.{k}": v for k, v in other.state_dict().items()})
    assert same(snapshot(base), before)
    assert torch.equal(outer["inside"](x, task="a"), other(x, task="a"))


def test_loading_the_same_base_keeps_sharing_its_memory() -> None:
    base = conv_net()
    model = trained(base, "a")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert model.base[0].weight.data_ptr() == base[0].weight.data_ptr()


def test_loading_in_another_type_never_touches_the_users_base() -> None:
    base = conv_net()
    before = snapshot(base)
    model = trained(base, "a")
    state = {k: v.double() for k, v in trained(conv_net(), "a").state_dict().items()}
    model.load_state_dict(state)
    assert same(snapshot(base), before)
    assert model.base[0].weight.dtype == torch.float32


def test_loading_with_assign_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model, other = model_of(Tied()), model_of(Tied())
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.base.one.weight is model.base.two.weight
    x = vectors()
    assert torch.equal(model(x, task="a"), other(x, task="a"))
    model.fold("a")


def test_the_base_is_never_modified() -> None:
    base = conv_net()
    base[0].weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    before, modes = snapshot(base), {n: m.training for n, m in base.named_modules()}
    for plan in (weft.full_finetune(base), weft.hard_sharing(base), weft.taps(base)):
        model = model_of(base, plan).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model.step({"a": images(), "b": images()}).outputs["a"].sum().backward()
        optimizer.step()
        model.to(torch.float64)
        model(images().double(), task="b").sum().backward()
        model.harden("a")
        model.fold("a").requires_grad_(True)
        model.eval().zero_grad()
    assert same(snapshot(base), before)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    assert {n: m.training for n, m in base.named_modules()} == modes
    assert all(p.grad is None for p in base.parameters())


def test_moving_to_another_type_moves_everything() -> None:
    model = trained(conv_net(), "a")
    x = images()
    single = model(x, task="a")
    model.to(torch.float64)
    double = model(x.double(), task="a")
    assert double.dtype == torch.float64
    assert torch.allclose(double, single.double(), atol=1e-5)
    model.add_task("b", weft.Classification(2))  # its dry run and head follow the model
    assert model(x.double(), task="b").dtype == torch.float64
    assert model.fold("a")(x.double()).dtype == torch.float64


def test_two_models_of_one_base_share_only_its_memory() -> None:
    base = mlp()
    one, two = (model_of(base, weft.hard_sharing(base)) for _ in range(2))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
    before = snapshot(two)
    one.step({"a": vectors()}).outputs["a"].sum().backward()
    optimizer.step()
    assert same(snapshot(two), before)
    frozen = weft.MultiTaskModel(base, weft.linear_probe(base))
    assert frozen.base[0].weight.data_ptr() == base[0].weight.data_ptr()


def test_fifty_tasks_cost_the_base_and_what_they_own() -> None:
    base = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64))
    model = weft.MultiTaskModel(base, weft.scale_bias(base)).eval()
    for i in range(50):
        model.add_task(f"t{i}", NO_HEAD)
    x = torch.randn(2, 64)
    with torch.no_grad():
        model.predict_all(x)
    view = model.view("t7")
    tensors = [*base.parameters(), *model.parameters(), *model.buffers(), *view.parameters()]
    unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    own = sum(model.ledger(t).own_bytes for t in model.task_names)
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    assert own == 50 * 2 * 256 * 4
    assert sum(unique.values()) <= 1.05 * (size + own)


def test_integer_and_complex_parameters_are_carried_along() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.code = nn.Parameter(torch.tensor([1, 2, 3, 4]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).abs() + self.code

    base = Odd()
    for plan in (weft.full_finetune(base), weft.linear_probe(base)):
        model = model_of(base, plan)
        x = vectors()
        assert torch.equal(model(x, task="a"), base(x))
        assert torch.equal(model.fold("a")(x), base(x))
    full = model_of(base)
    assert set(full.trainable("a")) == {"scale"}


def test_printing_names_the_plan_and_the_tasks() -> None:
    text = repr(model_of(mlp()))
    assert "sharing=full_finetune, tasks=['a', 'b']" in text
