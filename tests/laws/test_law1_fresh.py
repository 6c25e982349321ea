"""Law 1: a new task's backbone output is the base's, bit for bit in eval mode."""

from __future__ import annotations

import torch

from laws.cases import Case, Law, call, cases, features


@cases(Law.FRESH_IS_BASE)
def test_fresh_task_is_the_base(case: Case) -> None:
    base = case.base.make().eval()
    model = case.model(base).eval()
    x = case.base.inputs(3)
    with torch.no_grad():
        expected = features(call(base, x), case.base)
        for task in model.task_names:
            assert torch.equal(features(call(model.view(task), x), case.base), expected)


@cases(Law.FRESH_IS_BASE)
def test_fresh_task_in_grad_mode_is_the_base_in_grad_mode(case: Case) -> None:
    base = case.base.make().eval()
    model = case.model(base).eval()
    x = case.base.inputs(3)
    frozen = base.requires_grad_(False)  # fused paths look at whether weights require gradients
    expected = features(call(frozen, x), case.base)
    assert torch.equal(features(call(model.view("a"), x), case.base), expected)
