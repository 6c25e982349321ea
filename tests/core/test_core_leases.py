"""Leases: a structure serves one task at a time, is used again, and goes back when dropped."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import conv_net, images, mlp, model_of, vectors
from weft.core import pool
from weft.core.structure import Structure
from weft.errors import LeaseError, PlanError


def structures() -> int:
    """How many structures exist in this process."""
    gc.collect()
    return sum(type(o) is Structure for o in gc.get_objects())


@pytest.fixture(autouse=True)
def _start_clean() -> None:
    gc.collect()


class Slow(nn.Module):
    """Waits in its forward until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        ENTERED.set()
        assert GO_ON.wait(10)
        return self.inner(x)


ENTERED, GO_ON = threading.Event(), threading.Event()


def test_binding_is_refused_during_a_forward() -> None:
    model = model_of(Slow()).eval()
    view, other = model.view("a"), model.tensors("b")
    thread = threading.Thread(target=lambda: view(vectors()))
    thread.start()
    assert ENTERED.wait(10)
    with pytest.raises(LeaseError, match="a forward is running or a backward has not run yet"):
        view.bind(other)
    with pytest.raises(LeaseError, match=r"running in another thread. Use one view per thread"):
        view(vectors())
    GO_ON.set()
    thread.join()
    view.bind(other)


def test_binding_is_refused_before_a_pending_backward() -> None:
    model = model_of(mlp()).train()
    view = model.view("a")
    output = view(vectors())
    with pytest.raises(LeaseError, match="Call backward\\(\\) or drop the outputs first"):
        view.bind(model.tensors("b"))
    output.sum().backward()
    view.bind(model.tensors("b"))


def test_dropping_the_outputs_frees_the_view() -> None:
    model = model_of(mlp()).train()
    view = model.view("a")
    output = view(vectors())
    del output
    view.bind(model.tensors("b"))


def test_a_backward_that_keeps_its_graph_keeps_the_lease() -> None:
    model = model_of(mlp()).train()
    view = model.view("a")
    loss = view(vectors()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(LeaseError):
        view.bind(model.tensors("b"))
    loss.backward()
    view.bind(model.tensors("b"))


def test_a_pending_backward_in_outputs_of_unknown_classes_is_seen() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Box:
            return Box(self.inner(x))

    base = Boxed()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), output="value").train()
    model.add_task("a", weft.Task(None, nn.functional.mse_loss))
    view = model.view("a")
    box = view(vectors())
    with pytest.raises(LeaseError):
        view.bind(model.tensors("a"))
    box.value.sum().backward()
    view.bind(model.tensors("a"))


def test_names_that_are_missing_or_unknown_are_refused() -> None:
    view = model_of(mlp()).view("a")
    tensors = dict(view.named_parameters())
    with pytest.raises(PlanError, match=r"4 missing, 6 unknown|6 missing, 6 unknown"):
        view.bind(tensors)
    good = model_of(mlp()).tensors("a")
    with pytest.raises(PlanError, match=r"1 missing, 0 unknown, first '3.bias'"):
        view.bind({k: v for k, v in good.items() if k != "3.bias"})
    with pytest.raises(PlanError, match=r"1 unknown, first '3.biass'. Close matches: 3.bias"):
        view.bind({**good, "3.biass": good["3.bias"]})


def test_a_view_is_never_copied_stored_moved_or_unfrozen() -> None:
    view = model_of(mlp()).view("a")
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LeaseError, match=r"Take a new one: model.view"):
            copying(view)
    for moving in (lambda: view.to(torch.float64), view.half, lambda: view.requires_grad_(True)):
        with pytest.raises(LeaseError, match="owns no tensors"):
            moving()


def test_structures_stay_few_in_a_long_training_loop() -> None:
    before = structures()
    base = conv_net()
    model = model_of(base, weft.taps(base), "a", "b", "c").train()
    kept: list[Tensor] = []
    for i in range(30):
        step = model.step({t: images() for t in "abc"})
        loss = sum(o.sum() for o in step.outputs.values()) + step.penalty
        if i % 3:
            loss.backward()  # every third loss is dropped without one
        kept.append(loss.detach())
        with torch.no_grad():
            model(images(), task="a")
    # The outputs of a step may still be there when the next step begins.
    assert structures() - before <= 6


def test_structures_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Structure] = []

    def make(*arguments: Any) -> Structure:
        made.append(Structure(*arguments))
        return made[-1]

    monkeypatch.setattr(pool, "Structure", make)
    base = conv_net()
    model = model_of(base, weft.taps(base))
    for _ in range(10):
        outputs = model.train().step({t: images() for t in "ab"}).outputs
        sum(o.sum() for o in outputs.values()).backward()
        del outputs
        model.eval().view("a")(images())
        model(images(), task="b")
    assert len(made) <= 3


def test_dropped_views_give_their_structure_back() -> None:
    before = structures()
    model = model_of(conv_net()).eval()
    for _ in range(20):
        model.view("a")(images())
        model(images(), task="b")
    assert structures() - before <= 2
    views = [model.view("a") for _ in range(5)]
    assert structures() - before <= 6
    del views
    for _ in range(20):
        model.view("a")
    assert structures() - before <= 6


def test_a_view_in_a_cycle_that_is_collected_anywhere_does_no_harm() -> None:
    model = model_of(mlp()).eval()
    for _ in range(50):
        view = model.view("a")
        view.itself = [view]  # only the cycle collector frees it, at any moment
        del view
        model(vectors(), task="b")
    gc.collect()


def test_a_view_outlives_changes_of_its_model() -> None:
    model = model_of(mlp()).eval()
    x = vectors()
    view, expected = model.view("a"), model(x, task="a")
    model.remove_task("a")
    model.add_task("c", weft.Task(None, nn.functional.mse_loss))
    model(x, task="c")
    assert torch.equal(view(x), expected)


def test_removed_tasks_free_their_memory() -> None:
    base = conv_net()
    model = model_of(base).eval()
    model(images(), task="a")
    own = [weakref.ref(t) for t in model.tasks["a"].own.values()]
    model.remove_task("a")
    assert not any(reference() is not None for reference in own)


def test_a_view_made_in_inference_mode_works_outside_it() -> None:
    model = model_of(conv_net()).eval()
    with torch.inference_mode():
        view = model.view("a")
        model(images(), task="b")
    x = images().requires_grad_()
    view(x).sum().backward()
    model.train()
    model(x, task="b").sum().backward()
    assert x.grad is not None
