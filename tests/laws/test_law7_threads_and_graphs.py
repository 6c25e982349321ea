"""Law 7: threads, activation checkpointing, compiled and exported views agree with plain runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import weft
from laws.bases import TINY, Attention, Base, Residual
from laws.cases import (
    Case,
    Law,
    assert_close,
    assert_same_bits,
    call,
    cases,
    features,
    snapshot,
    supported,
)
from weft.registry import METHODS

# PyTorch itself does not compile recurrent layers into one graph.
COMPILED = tuple(b for b in TINY if b.name in ("convolutions", "tied", "attention", "custom"))


def in_threads(work: dict[str, Callable[[], None]]) -> None:
    """Run functions at the same time; re-raise what any of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(function: Callable[[], None]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in work.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@cases(Law.THREADS_AND_GRAPHS_AGREE, TINY)
def test_two_threads_on_two_tasks_agree_with_one(case: Case) -> None:
    model = case.trained().eval()
    x = case.base.inputs(3)
    with torch.no_grad():
        expected = {t: model(x, task=t) for t in "ab"}

    def predict(task: str) -> None:
        with torch.no_grad():
            for _ in range(15):
                assert torch.equal(model(x, task=task), expected[task])

    in_threads({t: lambda t=t: predict(t) for t in "ab"})


@cases(Law.THREADS_AND_GRAPHS_AGREE, TINY)
def test_two_threads_train_two_tasks_as_one_does(case: Case) -> None:
    model = case.trained().train()
    x = case.base.inputs(4)
    if model.plan("a").trains_shared:
        model.eval()  # shared statistics would depend on the order

    def gradients(task: str) -> list[Tensor]:
        step = model.step({task: x})
        wanted = model.task_parameters(task)  # of a policy, eval mode uses the choice only
        return list(torch.autograd.grad(step.outputs[task].sum(), wanted, allow_unused=True))

    expected = {t: gradients(t) for t in "ab"}

    def train(task: str) -> None:
        for _ in range(5):
            for found, wanted in zip(gradients(task), expected[task], strict=True):
                assert found is wanted or torch.equal(found, wanted)

    in_threads({t: lambda t=t: train(t) for t in "ab"})


class Checkpointed(nn.Module):
    """Blocks that are run again during the backward."""

    def __init__(self, *blocks: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x.flatten(2).mean(2) if x.dim() == 4 else x


def _checkpointed(kind: str, reentrant: bool | None) -> Base:
    if kind == "residual":
        blocks = (Residual(3, 6), Residual(6, 8))
        inputs = next(b.inputs for b in TINY if b.name == "residual")
    else:
        blocks = (Attention(), Attention())
        inputs = next(b.inputs for b in TINY if b.name == "attention")

    def rows(n: int) -> Tensor:
        # Reentrant checkpointing needs an input that requires gradients.
        return inputs(n).requires_grad_()

    base = Checkpointed(*blocks, reentrant=reentrant)
    has = frozenset({"layer", "bias", "norm", *(["blocks"] if kind == "residual" else [])})
    return Base(kind, lambda: copy.deepcopy(base), rows, has)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["residual", "attention"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "depthwise_patch"])
def test_checkpointing_agrees_with_none(method: str, kind: str, reentrant: bool) -> None:
    plain = Case(method, _checkpointed(kind, None))
    case = Case(method, _checkpointed(kind, reentrant))
    if not supported(case):
        with pytest.raises(weft.WeftError, match=f"^{method} "):
            case.plan(case.base.make())
        return
    expected = plain.trained().train()
    model = case.trained().train()
    model.load_state_dict(expected.state_dict())
    batches = {t: case.base.inputs(4) for t in "ab"}
    for each in (expected, model):
        torch.manual_seed(1)  # policies are sampled
        outputs = each.step(batches).outputs
        sum(o.square().sum() for o in outputs.values()).backward()  # two tasks in one backward
    assert_same_bits(snapshot(expected), snapshot(model))  # statistics were updated once
    for (name, one), other in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("method", ["scale_bias", "full_finetune"])
def test_a_checkpointed_view_updates_statistics_once(method: str) -> None:
    states = []
    for reentrant in (None, False):
        torch.manual_seed(3)
        case = Case(method, _checkpointed("residual", reentrant))
        model = case.trained().train()
        view = model.view("a")
        for _ in range(2):  # a view is used again, and its statistics go on
            view(case.base.inputs(4)).sum().backward()
        states.append(snapshot(model.tasks["a"]))
        counters = [v for k, v in states[-1].items() if "num_batches" in k]
        assert {int(count) for count in counters} == {5}  # they started from 3
    assert_same_bits(states[0], states[1])


@cases(Law.THREADS_AND_GRAPHS_AGREE, COMPILED)
def test_two_tasks_share_one_compiled_graph(case: Case) -> None:
    torch._dynamo.reset()
    model = case.trained().eval()
    x = case.base.inputs(3)
    counter = CompileCounterWithBackend("eager")
    view = model.view("a")
    compiled = torch.compile(view, backend=counter, fullgraph=True)
    with torch.no_grad():
        for task in model.task_names:
            view.bind(dict_of(model.view(task)))
            expected = features(call(model.view(task), x), case.base)
            assert_close(features(call(compiled, x), case.base), expected)
        assert counter.frame_count == 1
        for task in model.task_names:
            own = torch.compile(model.view(task), backend=counter, fullgraph=True)
            expected = features(call(model.view(task), x), case.base)
            assert_close(features(call(own, x), case.base), expected)
    assert counter.frame_count <= 2  # views of their own add at most one graph for all of them


def dict_of(view: weft.View) -> dict[str, Tensor]:
    """What a view is bound to."""
    return {name: table[a] for name, table, a in view._structure._slots}


@pytest.mark.parametrize("method", [m for m in METHODS if supported(Case(m, TINY[0]))])
def test_a_compiled_view_trains_like_an_eager_one(method: str) -> None:
    torch._dynamo.reset()
    case = Case(method, TINY[0])
    models = [case.trained().train()]
    models.append(copy.deepcopy(models[0]))
    x = case.base.inputs(4).requires_grad_()
    gradients = []
    for model, compile_it in zip(models, (False, True), strict=True):
        view = model.view("a")
        if compile_it:
            view = torch.compile(view, backend="aot_eager", fullgraph=True)
        wanted = [x, *model.trainable("a").values()]
        gradients.append(torch.autograd.grad(view(x).square().sum(), wanted, allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(snapshot(models[0]).values(), snapshot(models[1]).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@cases(Law.THREADS_AND_GRAPHS_AGREE, COMPILED)
def test_an_exported_view_agrees(case: Case) -> None:
    model = case.trained().eval()
    x = case.base.inputs(3)
    view = model.view("a")
    program = torch.export.export(view, (x,))
    with torch.no_grad():
        assert_close(program.module()(x), view(x))
