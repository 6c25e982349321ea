"""Law 4: gradients reach the trainable set, nothing else, and every zero is declared."""

from __future__ import annotations

import torch

from laws.cases import Case, Law, cases, closed
from weft.core.patch import Replace


@cases(Law.GRADIENTS_REACH_THE_TRAINABLE)
def test_gradients_reach_exactly_the_trainable_set(case: Case) -> None:
    base = case.base.make()
    model = case.trained(base).train()
    trainable = model.trainable("a")
    expected = {id(p) for p in model.task_parameters("a")}
    expected |= {id(p) for p in model.shared_trainable().values()}
    assert len(expected) == len(model.task_parameters("a")) + len(model.shared_trainable())

    step = model.step({"a": case.base.inputs(6)})
    (step.outputs["a"] * torch.randn_like(step.outputs["a"])).sum().backward()

    reached = {id(p) for p in model.parameters() if p.grad is not None}
    patches = model.tasks["a"].patches
    owned_instead = {
        id(p)
        for name, p in model.shared_trainable().items()
        if isinstance(patches.get(name), Replace) or p.grad is None
    }
    assert reached == expected - owned_instead
    assert all(p.grad is None for p in base.parameters())
    assert all(b.grad is None for b in model.buffers() if b.is_floating_point())
    shut = closed(model, "a")
    for key, parameter in trainable.items():
        gradient = parameter.grad
        assert gradient is not None, f"no gradient reaches {key}"
        assert bool(gradient.any()) == (key not in shut), key


@cases(Law.GRADIENTS_REACH_THE_TRAINABLE)
def test_every_shared_tensor_that_trains_is_reached_by_some_task(case: Case) -> None:
    model = case.trained().train()
    step = model.step({t: case.base.inputs(6) for t in model.task_names})
    loss = sum((o * torch.randn_like(o)).sum() for o in step.outputs.values())
    (loss + step.penalty).backward()
    for key, parameter in model.shared_trainable().items():
        assert parameter.grad is not None, f"no gradient reaches {key}"
        assert bool(parameter.grad.any()), key


@cases()
def test_inference_leaves_no_graph(case: Case) -> None:
    model = case.trained().eval()
    with torch.no_grad():
        assert not model(case.base.inputs(2), task="a").requires_grad
        assert not any(t.requires_grad for t in model.tensors("a").values())
    view = model.view("a")
    assert not any(p.requires_grad for p in view.parameters())
