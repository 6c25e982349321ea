"""Networks that mixed batches could get wrong: rows that see one another, hooks, order, state."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import weft
from core.small import NO_HEAD, conv_net, images, mlp, vectors
from core.test_core_mixing import disturbed, flops, model_of, owning
from weft.core.forms import form_of
from weft.errors import DataError, LeaseError, TaskError

ROWS = [0, 1, 0, 1]


def assert_like_apart(model: weft.MultiTaskModel, x: Any, rows: list[int]) -> None:
    """A mixed batch gives what each task gives for its rows alone."""
    mixed = model(x, task=rows)
    index = torch.tensor(rows)
    for task in set(rows):
        mine = tuple(t[index == task] for t in x) if isinstance(x, tuple) else x[index == task]
        expected = model(mine, task=task)
        found = torch.stack([row for row, t in zip(mixed, rows, strict=True) if t == task])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- hooks


def hooked(kind: str) -> nn.Module:
    """A layer around whose forward something happens."""
    layer = nn.Linear(4, 4)
    if kind == "pre":
        layer.register_forward_pre_hook(lambda _, args: (args[0].relu(),))
    elif kind == "post":
        layer.register_forward_hook(lambda _, __, output: output * 2)
    else:
        prune.l1_unstructured(layer, "weight", 0.5)
        layer(torch.randn(1, 4))
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("pre", ["2.weight"]), ("post", ["2.bias"]), ("prune", ["2.weight_orig", "2.bias"])],
)
@torch.no_grad()
def test_hooks_around_a_layer_happen(kind: str, names: list[str]) -> None:
    model = weft.MultiTaskModel(hooked(kind).eval(), weft.linear_probe(hooked(kind)))
    for task in "ab":
        model.add_task(task, NO_HEAD, sharing=owning(*names)(model.base))
    model.eval()
    assert_like_apart(model, vectors(4), ROWS)  # fresh tasks, which are all alike
    disturbed(model)
    assert_like_apart(model, vectors(4), ROWS)
    assert_like_apart(model, vectors(2), [0, 1])


@torch.no_grad()
def test_a_convolution_with_a_hook_is_called_for_a_single_image() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten())
    base[1].register_forward_pre_hook(lambda _, args: (args[0].relu(),))
    model = model_of(base, owning("1.weight"))
    assert_like_apart(model, images(8), [0, 1, 2, 0, 1, 2, 0, 1])
    assert_like_apart(model, images(3), [0, 1, 2])


@torch.no_grad()
def test_what_a_hook_keeps_is_of_this_call() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)
            self.norm.register_forward_hook(self.keep)

        def keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
            self.feature = output

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return self.layer(self.feature)

    base = Kept()
    model = model_of(base, owning("norm.weight"))
    x, y = vectors(4), vectors(4)
    model(x, task=ROWS)
    assert_like_apart(model, y, ROWS)


# ------------------------------------------------------------------------- rows and order


class Sorted(nn.Module):
    """Rows by descending length inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        return self.layer(x[order])[order.argsort()]


class Many(nn.Module):
    """A batch of many rows goes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            return torch.stack([self.layer(row[None]).mean(0) for row in x])
        return self.layer(x)


class Conditioned(nn.Module):
    """A parent that hands its child a value by an attribute."""

    class Child(nn.Linear):
        context: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.context)

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child(4, 4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        self.child.context = context.mean()
        return self.child(x)


class Query(nn.Module):
    """A parameter of the root with one row, which is no token of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.query.t()).softmax(1)
        return (weights.transpose(1, 2) @ x)[:, 0]


@torch.no_grad()
def test_an_order_that_equal_lengths_do_not_show() -> None:
    model = model_of(Sorted(), owning("layer.bias"), 2)
    x = torch.randn(8, 4)
    rows = [0, 1, 0, 1, 1, 0, 1, 0]
    for lengths in (torch.full((8,), 5), torch.tensor([1, 5, 3, 2, 8, 4, 9, 2])):
        assert_like_apart(model, (x, lengths), rows)


@torch.no_grad()
def test_another_way_for_more_rows() -> None:
    model = model_of(Many(), owning("layer.bias"), 2)
    assert_like_apart(model, vectors(4), ROWS)
    assert_like_apart(model, vectors(8), ROWS + ROWS)


@torch.no_grad()
def test_attributes_that_a_parent_sets_reach_the_child() -> None:
    for names in (["child.weight"], ["child.bias"]):
        model = model_of(Conditioned(), owning(*names), 2)
        x = vectors(4)
        for context in (torch.zeros(4, 1), torch.ones(4, 1)):
            mixed = model(x, context, task=ROWS)
            alone = model(x[[0, 2]], context[[0, 2]], task=0)
            assert torch.allclose(mixed[[0, 2]], alone, atol=1e-6)


@torch.no_grad()
def test_fresh_tasks_show_nothing_and_are_checked_all_the_same() -> None:
    base = Query()
    model = weft.MultiTaskModel(base, owning("query")(base))
    for task in "ab":
        model.add_task(task, NO_HEAD)
    x = torch.randn(4, 5, 4)
    model.eval()(x, task=ROWS)
    disturbed(model)
    assert_like_apart(model, x, ROWS)


# ------------------------------------------------------------------ rows that see one another


class Centred(nn.Module):
    """Rows minus their mean, always or in training only."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self._always = always

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0) if self._always or self.training else y


@pytest.mark.parametrize("plan", [weft.linear_probe, owning("layer.weight")])
@torch.no_grad()
def test_rows_of_other_tasks_are_never_seen(plan: Any) -> None:
    assert_like_apart(model_of(Centred(always=True), plan, 2), vectors(4), ROWS)
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert_like_apart(model_of(norm, weft.linear_probe, 2), vectors(4), ROWS)
    model = model_of(Centred(always=False), plan, 2)
    model(vectors(4), task=ROWS)
    assert_like_apart(model.train(), vectors(4), ROWS)


@torch.no_grad()
def test_heads_see_no_rows_of_other_tasks() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for task in "ab":
        model.add_task(task, weft.Task(Centred(always=True), NO_HEAD.loss))
    assert_like_apart(model.eval(), vectors(4), ROWS)


def test_forms_know_which_modules_are_there_twice() -> None:
    activation, layer = nn.ReLU(), nn.Linear(4, 4)
    twice = nn.Sequential(activation, nn.Linear(4, 4), activation).eval()
    once = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()).eval()
    assert form_of(twice) != form_of(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)).eval())
    assert form_of(twice) != form_of(once)
    assert form_of(nn.Sequential(layer, nn.Tanh(), layer).eval()) != form_of(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    )


def test_one_head_of_several_tasks_stays_in_its_mode() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for task in "ab":
        model.add_task(task, weft.Task(lambda _: shared, NO_HEAD.loss))
    x = vectors(64)
    dropped = model.train()(x, task=[0, 1] * 32)
    assert float((dropped == 0).float().mean()) > 0.5
    assert_like_apart(model.eval(), vectors(4), ROWS)


# ---------------------------------------------------------------------------------- state


@torch.no_grad()
def test_a_base_that_writes_to_its_input_is_right_from_the_first_call_on() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            x -= 1.0
            return self.norm(x * x)

    model = model_of(Writing(), owning("norm.weight"), 2)
    x = vectors(4)
    first, second = (model(x.clone(), task=ROWS) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first[[0, 2]], model(x[[0, 2]], task=0), atol=1e-6)


@torch.no_grad()
def test_a_first_batch_that_shows_nothing_does_not_part_tasks_for_good() -> None:
    base = conv_net().eval()
    plain = flops(lambda: base(images(6)))
    for first in (torch.zeros(6, 3, 8, 8), torch.full((6, 3, 8, 8), torch.nan)):
        model = model_of(base, weft.scale_bias)
        model(first, task=[0, 1, 2, 0, 1, 2])
        assert flops(lambda m=model: m(images(6), task=[0, 1, 2, 0, 1, 2])) == plain


@torch.no_grad()
def test_a_layer_too_large_for_many_tasks_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight tasks, as many as are checked at once, fit the kernel; twelve run task by task.
    monkeypatch.setattr("weft.core.units.LARGE", 10 * 24)
    base = mlp().eval()
    model = model_of(base, owning("0.weight"), 12)
    x, rows = vectors(24), list(range(12)) * 2
    model(x, task=rows)
    assert flops(lambda: model(x, task=rows)) == flops(lambda: base(x))
    assert_like_apart(model, x, rows)


@torch.no_grad()
def test_a_wrong_input_shape_is_explained_and_forgotten() -> None:
    model = model_of(conv_net(), weft.full_finetune)
    rows = [0, 1, 2, 0, 1, 2]
    model(images(6), task=rows)
    with pytest.raises(DataError, match="Bring the inputs to that shape"):
        model(torch.randn(6, 4, 8, 8), task=rows)
    once = flops(lambda: model(images(6), task=rows))
    assert once == flops(lambda: model(images(6), task=0))


@pytest.mark.parametrize("plan", [weft.scale_bias, weft.full_finetune, weft.taps])
def test_gradients_in_eval_mode_flow_through_one_forward(plan: Any) -> None:
    model = model_of(conv_net(), plan)
    model(images(6), task=[0, 1, 2, 0, 1, 2]).sum().backward()
    once = flops(lambda: model(images(6), task=[0, 1, 2, 0, 1, 2]))
    assert once == flops(lambda: model(images(6), task=0))
    assert all(p.grad is not None for p in model.task_parameters("t1"))


def test_each_task_has_its_own_copy_of_buffers_that_no_forward_may_change() -> None:
    base = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for task in "ab":
        model.add_task(task, NO_HEAD, sharing=owning("0.bias")(base))
    disturbed(model).train()
    assert_like_apart(model, vectors(4), ROWS)
    assert_like_apart(model, vectors(4), [1, 0, 1, 0])


# --------------------------------------------------------------------- views of several tasks


def test_a_view_of_several_tasks_refuses_what_it_cannot_answer() -> None:
    model = model_of(conv_net(), weft.scale_bias, 3, images(1), head=True)
    view = model.mixed_view()
    with pytest.raises(DataError, match=r"task has shape \(1,\) for 4 rows"):
        view(images(4), task=torch.tensor([1]))
    with pytest.raises(TaskError, match=r"outside 0\.\.2"):
        view(images(2), task=torch.tensor([0, 3]))


def test_threads_do_not_share_a_view_of_several_tasks() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            go_on.wait(5)
            return self.net(x)

    inside, go_on = threading.Event(), threading.Event()
    go_on.set()
    model = model_of(Slow(), weft.linear_probe, 2, images(1), head=True)
    view = model.mixed_view()
    inside.clear()
    go_on.clear()
    thread = threading.Thread(target=lambda: view(images(2), task=torch.tensor([0, 1])))
    thread.start()
    inside.wait(5)
    try:
        with pytest.raises(LeaseError, match="another thread"):
            view(images(2), task=torch.tensor([0, 1]))
    finally:
        go_on.set()
        thread.join()


def test_a_view_of_several_tasks_waits_for_its_backward() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]

    view = model_of(Again(), weft.scale_bias, 2, images(1)).mixed_view()
    x = images(2).requires_grad_()
    output = view(x, task=torch.tensor([0, 1]))
    with pytest.raises(LeaseError, match="backward"):
        view(x, task=torch.tensor([1, 0]))
    output.sum().backward()
    view(x, task=torch.tensor([1, 0]))
