"""Adapters: inline and side, own and shared tensors, records, context, skipping, folding."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import NO_HEAD, mlp, model_of, same, snapshot, squared, vectors
from weft.core.adapter import Adapter, Call, InlineAdapter, Insertion, Records, SideAdapter
from weft.core.sharing import Penalty
from weft.core.structure import Structure
from weft.errors import PlanError


class Scaled(InlineAdapter):
    """y -> y * (1 + gain) + common, with a common shift for all tasks; counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.common = nn.Parameter(torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def shared_names(self) -> frozenset[str]:
        return frozenset({"common"})

    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        if self.training:
            self.calls += 1
        y = inner(*args) * (1 + self.gain) + self.common + call.context.get("shift", 0.0)
        call.records[site] = {"size": y.square().mean(), "earlier": torch.tensor(len(call.records))}
        return y

    def fold(self, site: nn.Module) -> nn.Module:
        plain = nn.Linear(site.in_features, site.out_features)
        with torch.no_grad():
            plain.weight.copy_(site.weight * (1 + self.gain)[:, None])
            plain.bias.copy_(site.bias * (1 + self.gain) + self.common)
        return plain


@dataclass(frozen=True)
class Scaling(Insertion):
    """Inserts `Scaled`."""

    noise: float = 0.0

    def build(self, site: nn.Module) -> Adapter:
        adapter = Scaled(site.weight.shape[0])
        with torch.no_grad():
            adapter.gain.add_(self.noise * torch.randn_like(adapter.gain))
        return adapter


class Skip(InlineAdapter):
    """Runs its site only if the task's switch is on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("switch", torch.tensor(True))

    def shared_names(self) -> frozenset[str]:
        return frozenset()

    def forward(self, _call: Call, _site: str, inner: Callable[..., Any], *args: Any) -> Any:
        return inner(*args) if bool(self.switch) else args[0]

    def fold(self, _: nn.Module) -> nn.Module:
        raise PlanError("A switch has no plain form here.")


@dataclass(frozen=True)
class Skipping(Insertion):
    def build(self, _: nn.Module) -> Adapter:
        return Skip()


class Tap(SideAdapter):
    """Records what a shared projection makes of the output; a task weighs it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 2)
        self.weight = nn.Parameter(torch.ones(2))

    def shared_names(self) -> frozenset[str]:
        return frozenset({"projection.weight", "projection.bias"})

    def forward(self, output: Any) -> Tensor:
        return self.projection(output)

    def tap(self, feature: Tensor) -> Tensor:
        return feature * self.weight

    def fold(self, _: nn.Module) -> nn.Module:
        raise PlanError("A side tap has no plain form: the base's class has no place for it.")


@dataclass(frozen=True)
class Tapping(Insertion):
    def build(self, site: nn.Module) -> Adapter:
        return Tap(site.out_features)


@dataclass(frozen=True)
class Sizes(Penalty):
    """Mean recorded size over sites and tasks: pools over tasks."""

    weight: float
    needs_records = True

    def __call__(
        self,
        records: Mapping[str, Records],
        _own: Mapping[str, Mapping[str, Tensor]],
        _shared: Mapping[str, Tensor],
    ) -> Tensor:
        sizes = [s["size"] for r in records.values() for s in r.values()]
        return self.weight * torch.stack(sizes).mean().square()


def scaled(*sites: str, noise: float = 0.5) -> weft.Sharing:
    adapters = {s: Scaling(noise) for s in sites or ("0", "3")}
    return weft.Sharing("scaled", adapters=adapters, penalties=(Sizes(0.1),))


# ---------------------------------------------------------------------------------- inline


def test_an_inline_adapter_computes_with_each_tasks_tensors() -> None:
    base = mlp().eval()
    model = model_of(base, scaled("3")).eval()
    x = vectors()
    for task in "ab":
        gain = model.tasks[task].own["3:gain"]
        assert bool(gain.any())
        assert torch.allclose(model(x, task=task), base(x) * (1 + gain), atol=1e-6)
        assert torch.equal(model.view(task)(x), model(x, task=task))
    mixed = model(x, task=["a", "b", "b", "a"])
    assert torch.allclose(mixed[1], model(x, task="b")[1], atol=1e-6)
    assert torch.equal(model.predict_all(x)["a"], model(x, task="a"))


def test_own_and_shared_tensors_of_adapters_are_where_they_belong() -> None:
    base = mlp()
    model = model_of(base, scaled())
    own = {"0:gain", "0:calls", "3:gain", "3:calls"}
    assert set(model.tasks["a"].own) == own
    assert set(model.trainable("a")) == {"0:gain", "3:gain"}
    assert set(model.shared_trainable()) == {"0:common", "3:common"}
    assert set(model.tensors("a")) == own | {"0:common", "3:common"} | set(base.state_dict())
    step = model.step({"a": vectors(), "b": vectors()})
    sum(o.sum() for o in step.outputs.values()).backward()
    for task in "ab":
        assert all(p.grad is not None for p in model.trainable(task).values())
    assert all(p.grad is not None for p in model.shared_trainable().values())
    assert all(p.grad is None for p in model.base.parameters())


def test_buffers_of_adapters_belong_to_the_task() -> None:
    base = mlp()
    model = model_of(base, scaled()).train()
    for _ in range(3):
        model(vectors(), task="a").sum().backward()
    assert int(model.tasks["a"].own["0:calls"]) == 3
    assert int(model.tasks["b"].own["0:calls"]) == 0


def test_records_are_fresh_for_each_call_and_seen_by_later_sites() -> None:
    base = mlp()
    model = model_of(base, scaled())
    for _ in range(2):
        step = model.step({"a": vectors(), "b": vectors()})
        for task in "ab":
            assert list(step.records[task]) == ["0", "3"]
            assert int(step.records[task]["0"]["earlier"]) == 0
            assert int(step.records[task]["3"]["earlier"]) == 1
    view = model.view("a")
    view(vectors())
    assert set(view.records) == {"0", "3"}


def test_context_reaches_the_adapters() -> None:
    base = mlp().eval()
    model = model_of(base, scaled("3", noise=0.0)).eval()
    x = vectors()
    expected = base(x) + 2.0
    context = {"shift": 2.0}
    assert torch.allclose(model(x, task="a", context=context), expected)
    assert torch.allclose(model(x, task=["a"] * 4, context=context), expected)
    assert torch.allclose(model.predict_all(x, context=context)["b"], expected)
    assert torch.allclose(model.step({"a": x}, context=context).outputs["a"], expected)


def test_penalties_read_records_and_pool_over_tasks() -> None:
    base = mlp()
    model = model_of(base, scaled())
    step = model.step({"a": vectors(), "b": vectors()})
    sizes = [s["size"] for r in step.records.values() for s in r.values()]
    assert len(sizes) == 4
    assert torch.allclose(step.penalty, 0.1 * torch.stack(sizes).mean().square())
    step.penalty.backward()
    assert all(p.grad is not None for t in "ab" for p in model.trainable(t).values())
    assert float(model.step({"a": vectors()}, charge={"a": 0.0}).penalty) == 0.0
    with pytest.raises(PlanError, match="'scaled' charges for what a forward records"):
        model.penalty("a")


def test_folding_an_inline_adapter_gives_a_plain_network() -> None:
    base = mlp().eval()
    model = model_of(base, scaled()).eval()
    x = vectors()
    for task in "ab":
        folded = model.fold(task)
        assert {type(m) for m in folded.modules()} == {type(m) for m in base.modules()}
        assert folded.state_dict().keys() == base.state_dict().keys()
        assert torch.allclose(folded(x), model(x, task=task), atol=1e-6)


def test_folding_a_site_used_twice_and_sites_inside_sites() -> None:
    shared = nn.Linear(4, 4)
    base = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Linear(4, 4))).eval()
    plan = weft.Sharing("both", adapters={"0": Scaling(0.5), "2.1": Scaling(0.5)})
    model = model_of(base, plan).eval()
    x = vectors()
    assert torch.allclose(model.fold("a")(x), model(x, task="a"), atol=1e-6)
    nested = weft.Sharing("nested", adapters={"2": Skipping(), "2.1": Scaling(0.5)})
    model = model_of(base, nested).eval()
    model(x, task="a")
    with pytest.raises(PlanError, match="no plain form"):
        model.fold("a")


def test_adapters_go_through_copies_and_structures_without_random_numbers() -> None:
    base = mlp()
    model = model_of(base, scaled()).eval()
    x = vectors()
    expected = model(x, task="a")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x, task="a"), expected)
        state = torch.get_rng_state()
        views = [again.view("a") for _ in range(3)]  # each makes a structure
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(views[2](x), expected)


def test_equal_plans_share_their_structures() -> None:
    base = mlp()
    adapters = {"3": Skipping()}
    model = weft.MultiTaskModel(base, weft.linear_probe(base)).eval()
    for i in range(6):
        model.add_task(f"t{i}", NO_HEAD, sharing=weft.Sharing("skip", adapters=adapters))
    gc.collect()
    before = sum(type(o) is Structure for o in gc.get_objects())
    with torch.no_grad():
        model.predict_all(vectors())
    after = sum(type(o) is Structure for o in gc.get_objects())
    assert after - before <= 1


def test_an_adapter_compiles_into_one_graph_for_two_tasks() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    base = mlp()
    model = model_of(base, scaled()).eval()
    counter = CompileCounterWithBackend("eager")
    x = vectors()
    with torch.no_grad():
        view = model.view("a")
        compiled = torch.compile(view, backend=counter, fullgraph=True)
        for task in "ab":
            view.bind(model.tensors(task))
            assert torch.allclose(compiled(x), model(x, task=task), atol=1e-6)
    assert counter.frame_count <= 2  # Parameters and plain tensors are two kinds


# -------------------------------------------------------------------------------- skipping


def test_a_switched_off_block_is_not_run() -> None:
    calls: list[int] = []

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    base = nn.Sequential(Block(4, 4), Block(4, 4))
    model = model_of(base, weft.Sharing("skip", adapters={"0": Skipping()})).eval()
    model.tasks["b"].own["0:switch"] = torch.tensor(False)
    x = vectors()
    assert torch.equal(model(x, task="b"), base[1](x))
    calls.clear()
    model(x, task="b")
    assert len(calls) == 1
    model(x, task="a")
    assert len(calls) == 3


# ------------------------------------------------------------------------------------ side


class Reader(nn.Module):
    """A head that reads the side sites."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, features: Tensor, side: dict[str, Tensor]) -> Tensor:
        return self.linear(features) + sum(side.values())


def test_a_side_adapter_leaves_the_trunk_alone_and_feeds_the_head() -> None:
    base = mlp().eval()
    plan = weft.Sharing("tapped", adapters={"0": Tapping(), "3": Tapping()})
    model = weft.MultiTaskModel(base, plan, example=vectors(1)).eval()
    model.add_task("a", weft.Task(Reader(), squared, taps=True))
    model.add_task("b", NO_HEAD)
    with torch.no_grad():
        model.tasks["a"].own["0:weight"].mul_(3.0)
    x = vectors()
    assert torch.equal(model.view("a")(x), base(x))
    assert torch.equal(model(x, task="b"), base(x))
    shared = model.shared
    first, hidden = base[0](x), base(x)
    side = 3.0 * nn.functional.linear(
        first, shared["0:projection.weight"], shared["0:projection.bias"]
    ) + nn.functional.linear(hidden, shared["3:projection.weight"], shared["3:projection.bias"])
    expected = model.head("a").linear(hidden) + side
    assert torch.allclose(model(x, task="a"), expected, atol=1e-6)
    model.step({"a": x}).outputs["a"].sum().backward()
    assert all(p.grad is not None for p in model.task_parameters("a"))
    assert all(p.grad is not None for p in model.shared_trainable().values())
    with pytest.raises(PlanError, match="side tap has no plain form"):
        model.fold("a")


# --------------------------------------------------------------------------------- refusals


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("training", [True, False])
def test_a_site_whose_parent_never_calls_it_is_refused_by_name(training: bool) -> None:
    base = Attention()
    model = model_of(base, scaled("attention.out_proj")).train(training)
    x = torch.randn(2, 3, 4)
    for run in (lambda: model(x, task="a"), lambda: model.view("a")(x)):
        with pytest.raises(
            PlanError, match=r"'attention.out_proj' has no effect.*that replaces tens"
        ):
            run()


def test_fused_paths_do_not_bypass_an_adapter() -> None:
    base = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).eval()
    model = model_of(base, scaled("linear2", noise=0.5)).eval()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():  # where PyTorch would fuse the layer
        assert not torch.allclose(model(x, task="a"), base(x), atol=1e-3)
        assert torch.allclose(model(x, task="a"), model.fold("a")(x), atol=1e-5)


def test_a_site_that_a_forward_has_no_use_for_is_no_error() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor, which: bool = True) -> Tensor:
            return (self.used if which else self.idle)(x)

    base = Branches()
    model = model_of(base, scaled("used", "idle"))
    x = vectors()
    assert model(x, task="a").shape == model(x, task="a", which=False).shape


@pytest.mark.parametrize("site", ["4", "", "0.inner"])
def test_an_unknown_site_is_refused(site: str) -> None:
    with pytest.raises(PlanError, match=f"inserts at '{site}', which is no module inside the base"):
        model_of(mlp(), weft.Sharing("wrong", adapters={site: Scaling()}))


def test_attributes_of_the_site_are_seen_through_the_adapter() -> None:
    class Nosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            assert self.linear.in_features == 4
            with pytest.raises(AttributeError, match="nothing_like_this"):
                _ = self.linear.nothing_like_this
            return self.linear(x.to(self.linear.weight.dtype))

    base = Nosy()
    assert model_of(base, scaled("linear"))(vectors(), task="a").shape == (4, 5)


def test_training_with_adapters_leaves_the_others_alone() -> None:
    base = mlp()
    plan = weft.Sharing("skip", adapters={"3": Skipping()})
    model = model_of(base, plan).train()
    before = snapshot(model.tasks["b"])
    model(vectors(), task="a")
    assert same(snapshot(model.tasks["b"]), before)
