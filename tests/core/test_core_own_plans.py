"""A task with a plan of its own leaves the shared tensors of the model's plan alone."""

from __future__ import annotations

import torch
from torch import nn

import weft


def test_a_task_with_its_own_plan_sends_no_gradient_into_trained_shared_tensors() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    shared = weft.hard_sharing(base, own="top", fraction=0.4)
    model = weft.MultiTaskModel(base, shared, example=torch.zeros(1, 3))
    model.add_task("joint", weft.Classification(2))
    model.add_task("apart", weft.Classification(2), sharing=weft.bias_only(base))
    x = torch.randn(5, 3)
    model(x, task="apart").sum().backward()
    assert all(p.grad is None for p in model.shared_trainable().values())
    assert all(p.grad is not None for p in model.task_parameters("apart"))
    model(x, task="joint").sum().backward()
    assert all(p.grad is not None for p in model.shared_trainable().values())


def test_each_task_is_charged_at_its_own_factor() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    model = weft.MultiTaskModel(base, weft.taps(base, penalty=1.0), example=torch.zeros(1, 3))
    model.add_task("warm", weft.Classification(2))
    model.add_task("late", weft.Classification(2), sharing=weft.taps(base, penalty=1.0, warmup=0))
    x = torch.randn(4, 3)
    batches = {"warm": x, "late": x}
    with torch.no_grad():
        alone = float(model.penalty("late"))
        charged = model.step(batches, charge={"warm": 0.0, "late": 1.0}).penalty
        assert float(charged) == alone
        assert float(model.step(batches).penalty) == 2 * alone
