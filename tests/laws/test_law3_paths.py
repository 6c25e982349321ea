"""Law 3: view = functional_call = fold = row of a mixed batch = predict_all, in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

import weft
from laws.cases import INSERTING, Case, Law, assert_close, call, cases, features, rows
from weft.errors import DataError, TaskError


def composed(model: weft.MultiTaskModel, case: Case, task: str, x: object) -> Tensor:
    """The oracle: PyTorch's own functional call of the user's kind of base, then the head.

    With insertions, the folded network.
    """
    base = case.base.make().eval()
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    if case.method in INSERTING:
        return model.head(task)(features(call(model.fold(task), x), case.base))
    output = functional_call(base, model.tensors(task), args, kwargs)
    return model.head(task)(features(output, case.base))


@cases(Law.ALL_PATHS_AGREE)
def test_all_paths_agree(case: Case) -> None:
    model = case.trained().eval()
    x = case.base.inputs(4)
    with torch.no_grad():
        everything = model.predict_all(x)
        for task in model.task_names:
            head = model.head(task)
            expected = composed(model, case, task, x)
            assert_close(model(x, task=task), expected)
            assert_close(everything[task], expected)
            assert_close(head(features(call(model.view(task), x), case.base)), expected)
            assert_close(head(features(call(model.fold(task), x), case.base)), expected)
            if isinstance(x, dict):
                assert_close(model(**x, task=task), expected)


@cases(Law.ALL_PATHS_AGREE)
def test_each_row_of_a_mixed_batch_is_its_tasks(case: Case) -> None:
    model = case.trained().eval().double()
    x = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, case.base.inputs(5))
    with torch.no_grad():
        alone = {t: [model(rows(x, [i]), task=t)[0] for i in range(5)] for t in model.task_names}
        mixed = model(x, task=["b", "a", "b", "b", "a"])
        assert isinstance(mixed, Tensor)
        assert_close(mixed, torch.stack([alone[t][i] for i, t in enumerate("babba")]), 1e-10)
        assert torch.equal(model(x, task=torch.tensor([1, 0, 1, 1, 0])), mixed)
        assert torch.equal(model(x, task=[1, "a", 1, "b", 0]), mixed)
        unlike = model(x, task=["c", "a", "c", "b", "a"])
        assert isinstance(unlike, list)
        for i, task in enumerate("cacba"):
            assert_close(unlike[i], alone[task][i], 1e-10)


@cases(Law.ALL_PATHS_AGREE)
def test_any_mix_of_rows_is_that_of_their_tasks(case: Case) -> None:
    model = case.trained()
    model.add_task("none", weft.Task(head=None, loss=lambda output, _: output.sum()))
    model.harden("a")  # it now owns less than the others
    model.eval().double()
    x = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, case.base.inputs(6))
    names = model.task_names
    generator = torch.Generator().manual_seed(len(case.base.name))
    with torch.no_grad():
        alone = {t: [model(rows(x, [i]), task=t)[0] for i in range(6)] for t in names}
        assert model(rows(x, []), task=[]) == []
        for _ in range(4):
            chosen = [names[i] for i in torch.randint(0, len(names), (6,), generator=generator)]
            mixed = model(x, task=chosen)
            for i, task in enumerate(chosen):
                assert_close(mixed[i], alone[task][i], 1e-10)


@cases(Law.ALL_PATHS_AGREE)
def test_hardening_changes_no_output_and_files_nothing_for_closed_gates(case: Case) -> None:
    model = case.trained().eval()
    x = case.base.inputs(3)
    with torch.no_grad():
        before = {t: model(x, task=t) for t in model.task_names}
        ledger = model.ledger("a")
        model.harden("a")
        assert model.ledger("a") == ledger
        for task, output in before.items():
            assert torch.equal(model(x, task=task), output)


@cases(Law.ALL_PATHS_AGREE, insertions=False)
def test_fold_has_the_class_keys_and_ties_of_the_base(case: Case) -> None:
    base = case.base.make()
    folded = case.trained(base).fold("a")
    assert type(folded) is type(base)
    assert folded.state_dict().keys() == base.state_dict().keys()
    for name, tensor in base.state_dict(keep_vars=True).items():
        found = folded.state_dict(keep_vars=True)[name]
        assert type(found) is type(tensor)
        assert found.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
    assert len(list(folded.parameters())) == len(list(base.parameters()))


@cases(insertions=False)
def test_a_view_differentiates_like_functional_call(case: Case) -> None:
    model = case.trained().eval()
    base = case.base.make().eval()
    parameters = dict(base.named_parameters())
    x = case.base.inputs(2)
    tensors = {k: v.detach().requires_grad_(k in parameters) for k, v in model.tensors("a").items()}
    wanted = {k: v for k, v in tensors.items() if v.requires_grad}
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    outputs = (
        features(functional_call(base, tensors, args, kwargs), case.base),
        features(call(model.view("a").bind(tensors), x), case.base),
    )
    expected, found = (
        torch.autograd.grad(o.square().sum(), list(wanted.values()), allow_unused=True)
        for o in outputs
    )
    for name, one, other in zip(wanted, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), name


@cases(Law.ALL_PATHS_AGREE)
def test_unknown_tasks_are_named(case: Case) -> None:
    model = case.model().eval()
    x = case.base.inputs(2)
    for wrong in ("nobody", ["a", "nobody"]):
        with pytest.raises(TaskError, match=r"no task 'nobody'. Tasks: a, b, c"):
            model(x, task=wrong)
    with pytest.raises(TaskError, match=r"index 7 is outside 0\.\.2"):
        model(x, task=[0, 7])
    with pytest.raises(DataError, match="found 3 tasks for 2 rows"):
        model(x, task=["a", "b", "a"])
