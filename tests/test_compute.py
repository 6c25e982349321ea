"""Multiply-adds against hand-made counts, and what of them tasks have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.core.patch import Replace
from weft.core.sharing import Sharing


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


X = torch.zeros(1, 3, 4, 4)
FIRST, DEPTHWISE, LAST, HEAD = 16 * 4 * 27, 16 * 4 * 9, 64 * 8, 8 * 5


def compute(plan: Sharing, base: nn.Module, tasks: int = 3, x: Tensor = X) -> weft.Compute:
    model = weft.MultiTaskModel(base, plan, example=x)
    for i in range(tasks):
        model.add_task(f"t{i}", weft.Classification(5))
    return weft.multiply_adds(model, x)


@pytest.mark.parametrize(
    ("plan", "common"),
    [
        (weft.linear_probe, FIRST + DEPTHWISE + LAST),
        (weft.full_finetune, 0),
        (weft.scale_bias, FIRST),
        (lambda b: weft.hard_sharing(b, own=["5"], batchnorm="follow"), FIRST + DEPTHWISE),
        (lambda b: weft.hard_sharing(b, own=["3"], batchnorm="follow"), FIRST),
        (lambda b: weft.hard_sharing(b, own=["0"], batchnorm="follow"), 0),
    ],
    ids=["head", "all", "normalisation", "last", "middle", "first"],
)
def test_what_comes_before_the_first_own_tensor_is_common(plan, common: int) -> None:  # type: ignore[no-untyped-def]
    base = net()
    found = compute(plan(base), base)
    whole = FIRST + DEPTHWISE + LAST + HEAD
    assert found.common == common
    assert found.own == dict.fromkeys(("t0", "t1", "t2"), whole - common)
    assert found.of("t1") == whole
    assert found.all_tasks == common + 3 * (whole - common)


class Branches(nn.Module):
    """Two branches of one input; only one of them is owned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_a_branch_without_own_tensors_is_common() -> None:
    base = Branches()
    plan = weft.hard_sharing(base, own=["left"], batchnorm="follow")
    found = compute(plan, base, x=torch.zeros(1, 6))
    assert found.common == 60
    assert found.own["t0"] == 60 + 10 * 5


def test_what_one_task_owns_is_common_to_none() -> None:
    """A closed gate reads the base, but what another task owns cannot be computed for both."""
    base = net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=X)
    model.add_task("a", weft.Classification(5))
    model.add_task("b", weft.Classification(5), sharing=weft.bias_only(base))
    found = weft.multiply_adds(model, X)
    assert found.common == 0
    assert found.of("a") == found.of("b") == FIRST + DEPTHWISE + LAST + HEAD
    assert found.all_tasks == 2 * found.of("a")


def test_what_only_some_tasks_have_in_common_is_computed_once_for_them() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=X)
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(5))
    model.add_task("c", weft.Classification(5), sharing=weft.full_finetune(base))
    found = weft.multiply_adds(model, X)
    trunk = FIRST + DEPTHWISE + LAST
    assert found.common == 0
    assert found.all_tasks == trunk + 2 * HEAD + trunk + HEAD


class Blocks(nn.Module):
    """A stem and three residual blocks of 100 multiply-adds each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 10, bias=False)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(10, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_what_follows_a_skipped_block_is_not_in_common() -> None:
    """Policies steer which blocks run: the third block reads something else in each task."""
    base, x = Blocks(), torch.randn(1, 10)
    model = weft.MultiTaskModel(base, weft.adashare(base, example=x), example=x)
    for name, policy in (("a", "011"), ("b", "100"), ("c", "101"), ("d", "111")):
        model.add_task(name, weft.Task(head=None, loss=nn.functional.mse_loss))
        for place, execute in enumerate(policy):
            model.tasks[name].own[f"blocks.{place}:execute"].fill_(execute == "1")
    found = weft.multiply_adds(model, x)
    assert found.common == 100  # the stem
    assert found.own == {"a": 200, "b": 100, "c": 200, "d": 300}
    # a: 1, 2; b, c and d: 0; c: 2; d: 1, 2
    assert found.all_tasks == 100 + 200 + 100 + 100 + 200


def test_memory_that_changes_in_place_is_something_else() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, :2].mul_(self.scale[:2])
            return self.last(y)

    base = InPlace()
    plan = weft.Sharing("scale", patches={"scale": Replace()})
    found = compute(plan, base, x=torch.zeros(1, 4))
    assert found.common == 16
    assert found.own["t0"] == 16 + 4 * 5


def test_layers_behind_closed_gates_are_in_common() -> None:
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = weft.MultiTaskModel(base, weft.taps(base), example=torch.zeros(1, 4))
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(2))
        with torch.no_grad():
            model.tasks[name].own["0:score"].fill_(0.0)
    for _ in range(2):
        found = weft.multiply_adds(model, torch.zeros(1, 4))
        assert (found.common, found.own) == (24, {"a": 18 + 6, "b": 18 + 6})
        model.harden("a")


def test_constants_that_the_forward_makes_are_the_same_for_all() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
            mask = torch.from_numpy(np.ones(6, dtype=np.float32))
            return self.last(self.first(x) * scale * mask)

    base = Scaled()
    found = compute(weft.linear_probe(base), base, x=torch.zeros(1, 6))
    assert found.common == 6 * 6 + 6 * 4
    assert set(found.own.values()) == {4 * 5}


def test_counting_leaves_the_model_as_it_was() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=X)
    model.add_task("a", weft.Classification(5))
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weft.multiply_adds(model, X)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_inputs_that_are_no_tensors_are_left_out() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, flag: bool | None = None) -> Tensor:
            return self.layer(x if flag is None else 2 * x)

    base = Flagged()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(head=None, loss=nn.functional.mse_loss))
    for flag in (None, True):
        assert weft.multiply_adds(model, {"x": torch.zeros(1, 6), "flag": flag}).common == 24


def test_a_model_without_tasks_costs_nothing() -> None:
    base = net()
    found = weft.multiply_adds(weft.MultiTaskModel(base, weft.linear_probe(base)), X)
    assert (found.common, found.own, found.all_tasks) == (0, {}, 0)


def test_attention_counts_its_products() -> None:
    """Projections 3 d^2 + d^2 per token, scores and their sum n^2 d each."""
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.zeros(1, 5, 8)
    found = compute(weft.linear_probe(base), base, tasks=2, x=x)
    tokens = 5
    expected = tokens * 4 * 64 + 2 * tokens * tokens * 8 + tokens * 2 * 8 * 16
    assert found.common == expected


def test_modes_of_single_modules_stay() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=X)
    model.add_task("a", weft.Classification(5))
    model.train()
    model.base[1].eval()
    weft.multiply_adds(model, X, tasks=["a"])
    assert model.training
    assert not model.base[1].training


def test_counting_works_in_inference_mode() -> None:
    base = net()
    with torch.inference_mode():
        found = compute(weft.linear_probe(base), base, x=torch.zeros(1, 3, 4, 4))
    assert found.of("t0") == FIRST + DEPTHWISE + LAST + HEAD
