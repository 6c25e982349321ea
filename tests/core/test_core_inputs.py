"""Inputs of a wrong shape are named beside the shape that the base has run on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from weft.errors import DataError, PlanError


def test_a_wrong_input_shape_is_named_with_the_right_one() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = weft.MultiTaskModel(base, weft.taps(base), example=torch.zeros(1, 3, 8, 8))
    model.add_task("a", weft.Classification(2))
    with pytest.raises(DataError, match=r"\(rows, 1, 8, 8\); it has run on \(rows, 3, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8), task="a")
    assert model(torch.zeros(2, 3, 9, 9), task="a").shape == (2, 2)


def test_running_out_of_memory_is_not_called_a_wrong_shape() -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(2)
            self.linear(torch.zeros(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 2:
                raise torch.OutOfMemoryError("too large")
            return self.linear(x)

    base = Hungry()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 2))
    model.add_task("a", weft.Classification(2))
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        model(torch.zeros(3, 4), task="a")


def test_an_error_of_the_base_itself_is_not_hidden() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x > 1).any()):
                raise RuntimeError("out of something")
            return x * self.weight

    base = Broken()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 2))
    model.add_task("a", weft.Task(head=None, loss=nn.MSELoss()))
    with pytest.raises(RuntimeError, match="out of something") as error:
        model(torch.full((3, 2), 2.0), task="a")
    assert not isinstance(error.value, DataError)


def test_a_base_with_an_input_called_context_gets_it_in_a_dict() -> None:
    class Contextual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + context

    base = Contextual()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    model.add_task("a", weft.Task(head=None, loss=nn.MSELoss()))
    x, c = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(DataError, match="gets it in a dict"):
        model(x, context=c, task="a")
    assert torch.equal(model({"x": x, "context": c}, task="a"), base(x, c))


class _Recurrent(nn.Module):
    """Takes a state of shape (layers, rows, size) beside its input, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, num_layers=2, batch_first=True)

    def forward(
        self, x: torch.Tensor, start: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = self.cell(x, start)[0][:, -1]
        return output if scale is None else output * scale


def _two_tasks() -> weft.MultiTaskModel:
    base = _Recurrent()
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=torch.zeros(1, 5, 3))
    for name in "ab":
        model.add_task(name, weft.Classification(2))
        for parameter in model.task_parameters(name):
            nn.init.normal_(parameter)
    return model.eval()


def test_a_mixed_batch_refuses_inputs_without_rows_first() -> None:
    model = _two_tasks()
    x, start = torch.randn(3, 5, 3), torch.randn(2, 3, 4)
    assert model({"x": x, "start": start}, task="a").shape == (3, 2)
    with pytest.raises(DataError, match=r"found shape \(2, 3, 4\) in a batch of 3 rows"):
        model({"x": x, "start": start}, task=["a", "b", "a"])


def test_a_mixed_batch_gives_inputs_of_one_row_to_all_rows() -> None:
    model = _two_tasks()
    x, scale = torch.randn(3, 5, 3), torch.randn(1, 4)
    mixed = model(x, scale=scale, task=["a", "b", "a"])
    for row, name in enumerate("aba"):
        alone = model(x[row : row + 1], scale=scale, task=name)
        torch.testing.assert_close(mixed[row : row + 1], alone)


def test_a_base_that_writes_to_its_input_is_refused_where_tasks_share_one() -> None:
    base = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 3))
    for name in "ab":
        model.add_task(name, weft.Task(head=None, loss=nn.MSELoss()))
    x = torch.randn(4, 3)
    expected = nn.functional.linear(x.relu(), base[1].weight, base[1].bias)
    with pytest.raises(DataError, match="The base writes to its input"):
        model.predict_all(x.clone())
    y = x.clone()
    with pytest.raises(DataError, match="The base writes to its input"):
        model.step({"a": y, "b": y})
    # Inputs apart, one task, and rows of one batch do not disturb each other.
    apart = model.step({"a": x.clone(), "b": x.clone()}).outputs
    assert torch.equal(apart["a"], apart["b"])
    torch.testing.assert_close(model(x.clone(), task="b"), expected)
    torch.testing.assert_close(model(x.clone(), task=["a", "a", "b", "b"]), expected)
    model.eval()
    kept = x.clone()
    with torch.no_grad():
        assert torch.equal(model.predict_all(kept)["b"], expected)  # one pass computes both
    with torch.no_grad():
        model.tasks["a"].own["1.bias"].add_(1.0)
    alone = {name: model(x.clone(), task=name) for name in "ab"}
    with torch.no_grad():
        found = model.predict_all(x.clone())
    assert all(torch.equal(found[name], alone[name]) for name in "ab")
    with torch.inference_mode():
        # Inference tensors do not say when they are written to: each task gets a copy.
        outputs = model.train().predict_all(x.clone())
    assert all(torch.equal(outputs[name], alone[name]) for name in "ab")


def test_a_base_that_cannot_be_copied_is_refused_with_a_way_out() -> None:
    base = nn.Linear(3, 2)
    base.cached = base(torch.randn(1, 3))  # a tensor inside a graph
    with pytest.raises(PlanError, match=r"a Linear, cannot be copied.*weight normalisation"):
        weft.MultiTaskModel(base, weft.full_finetune(base))
