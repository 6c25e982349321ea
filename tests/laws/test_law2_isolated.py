"""Law 2: adding and training a task leaves every other task and the base bit-identical."""

from __future__ import annotations

import copy

import pytest
import torch

import weft
from laws.cases import (
    ALL,
    METHODS,
    Case,
    Law,
    assert_same_bits,
    cases,
    disturb,
    snapshot,
    supported,
)


def train(model: weft.MultiTaskModel, case: Case, task: str, steps: int = 2) -> None:
    """A few steps on one task and on all that trains with it."""
    model.train()
    trained = [*model.task_parameters(task), *model.shared_trainable().values()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        step = model.step({task: case.base.inputs(4)})
        optimizer.zero_grad()
        (step.outputs[task].square().sum() + step.penalty).backward()
        optimizer.step()
    model.eval()


@cases(Law.TASKS_ARE_ISOLATED)
def test_training_one_task_changes_no_bit_of_the_others(case: Case) -> None:
    base = case.base.make()
    model = case.trained(base).eval()
    x = case.base.inputs(3)
    before, users = snapshot(model), snapshot(base)
    outputs = {t: model(x, task=t) for t in "bc"}

    model.add_task("new", weft.Regression())
    train(model, case, "new")
    train(model, case, "a")

    assert_same_bits(users, snapshot(base))
    after = snapshot(model)
    mine = ("tasks.a.", "tasks.new.")
    assert_same_bits(
        {k: v for k, v in before.items() if not k.startswith(mine)},
        {k: v for k, v in after.items() if not k.startswith(mine)},
    )
    for task, output in outputs.items():
        assert torch.equal(model(x, task=task), output)


@cases()
def test_training_a_task_changes_its_outputs(case: Case) -> None:
    model = case.trained().eval()
    x = case.base.inputs(3)
    before = model(x, task="a")
    train(model, case, "a")
    assert not torch.equal(model(x, task="a"), before)


EXCEPTED = [m for m in METHODS if Law.TASKS_ARE_ISOLATED in METHODS[m].exceptions]


@pytest.mark.parametrize("method", EXCEPTED)
def test_a_declared_exception_is_real_and_spares_the_users_base(method: str) -> None:
    case = next(c for c in ALL if c.method == method and supported(c))
    base = case.base.make()
    users = snapshot(base)
    model = case.model(base)
    disturb(model)
    owned = snapshot(model.tasks["b"])
    assert model.plan("a").trains_shared
    shared = {k: v.detach().clone() for k, v in model.shared_trainable().items()}
    train(model, case, "a")
    assert any(not torch.equal(shared[k], v) for k, v in model.shared_trainable().items())
    assert_same_bits(users, snapshot(base))
    assert_same_bits(owned, snapshot(model.tasks["b"]))


@cases(Law.TASKS_ARE_ISOLATED)
def test_a_joint_step_gives_each_task_what_it_gets_alone(case: Case) -> None:
    model = case.trained()
    alone = copy.deepcopy(model)
    batches = {t: case.base.inputs(4) for t in "ab"}
    total = sum(o.square().sum() for o in model.step(batches).outputs.values())
    total.backward()
    for task, x in batches.items():
        alone.step({task: x}).outputs[task].square().sum().backward()
        joint = model.task_parameters(task)
        for found, expected in zip(alone.task_parameters(task), joint, strict=True):
            assert torch.equal(found.grad, expected.grad)
        assert_same_bits(snapshot(model.tasks[task]), snapshot(alone.tasks[task]))
