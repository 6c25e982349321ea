"""Law 5: tied weights stay tied; own statistics stay per task, frozen ones never move."""

from __future__ import annotations

import torch
from torch import nn

import weft
from laws.cases import INSERTING, Case, Law, assert_same_bits, cases, snapshot
from weft.core.sites import canonical_names, statistics_modules
from weft.core.structure import Inserted


@cases(Law.TIES_AND_STATISTICS_HOLD)
def test_tied_tensors_stay_tied(case: Case) -> None:
    model = case.trained()
    names = canonical_names(model.base)
    for task in model.task_names:
        for mode in (True, False):
            view = model.train(mode).view(task)
            for name, first in names.items():
                assert tensor_at(view.structure, name) is tensor_at(view.structure, first)
        if case.method in INSERTING:
            continue
        folded = model.fold(task)
        for name, first in names.items():
            assert tensor_at(folded, name) is tensor_at(folded, first)


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by name."""
    path, _, attribute = name.rpartition(".")
    holder = module.get_submodule(path)
    if isinstance(holder, Inserted):
        holder = holder.inner
    tensor = holder._parameters.get(attribute)
    return holder._buffers[attribute] if tensor is None else tensor


@cases(Law.TIES_AND_STATISTICS_HOLD)
def test_only_statistics_that_the_plan_trains_move(case: Case) -> None:
    base = case.base.make()
    users = snapshot(base)
    model = case.trained(base)
    before = snapshot(model)
    for _ in range(2):
        model.train().step({"a": case.base.inputs(6)})
    after = snapshot(model)
    assert_same_bits(users, snapshot(base))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == expected_to_move(model, "a")
    for _ in range(2):
        model.eval().step({"a": case.base.inputs(6)})
    assert_same_bits(after, snapshot(model))


def expected_to_move(model: weft.MultiTaskModel, task: str) -> set[str]:
    """State-dict names of the statistics that a step of this task updates."""
    plan = model.plan(task)
    moving = set()
    for path, buffers in statistics_modules(model.base).items():
        if isinstance(model.base.get_submodule(path), nn.InstanceNorm2d):
            buffers = tuple(b for b in buffers if "num_batches" not in b)  # PyTorch never counts
        if all(b in plan.patches for b in buffers):
            moving |= {f"tasks.{task}.own.{b.replace('.', '/')}" for b in buffers}
        elif all(b in plan.train_shared for b in buffers):
            moving |= {f"base.{b}" for b in buffers}
    return moving


@cases(Law.TIES_AND_STATISTICS_HOLD)
def test_modules_with_frozen_statistics_stay_in_eval_mode(case: Case) -> None:
    model = case.model().train()
    view, plan = model.view("a"), model.plan("a")
    trained = plan.patches.keys() | plan.train_shared
    for path, buffers in statistics_modules(model.base).items():
        assert view.structure.get_submodule(path).training == trained.issuperset(buffers)
