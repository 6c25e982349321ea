"""How alike tasks are: the formula, the order, and what counts as a change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import DataError
from weft.reporting.owned import changes_of
from weft.reports import from_model
from weft.reports.drawing import Rects, Text
from weft.reports.matrix import draw_matrix, level
from weft.reports.similarity import relative_change, reordered, similarity, strongest

A, B = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([3.0, -1.0, 0.5])


def test_same_opposite_and_other_layers() -> None:
    found = similarity(
        {"one": {"w": A}, "same": {"w": 3 * A}, "opposite": {"w": -A}, "other": {"v": B}, "no": {}}
    )
    row = dict(zip(found.tasks, found.values[0], strict=True))
    assert row == pytest.approx(
        {"one": 1.0, "same": 1.0, "opposite": -1.0, "other": 0.0, "no": 0.0}
    )
    assert found.values[4][4] == 0.0  # who changed nothing is like nobody, itself included


def test_values_are_the_cosine_of_all_changes_joined() -> None:
    torch.manual_seed(0)
    shapes = {"w": (3, 2), "v": (4,), "u": (2, 2, 2)}
    owned = {"a": "wv", "b": "wvu", "c": "u", "d": "v"}
    changes = {t: {n: torch.randn(shapes[n]) for n in names} for t, names in owned.items()}
    joined = np.stack(
        [
            np.concatenate(
                [changes[t].get(n, torch.zeros(s)).numpy().ravel() for n, s in shapes.items()]
            )
            for t in owned
        ]
    ).astype(np.float64)
    unit = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity(changes).values, unit @ unit.T, atol=1e-6)


def test_layers_count_by_their_relative_change() -> None:
    base = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(
        relative_change(base + 1, base), torch.full((2,), 0.2, dtype=torch.float64)
    )
    assert torch.equal(
        relative_change(torch.ones(2), torch.zeros(2)), torch.ones(2, dtype=torch.float64)
    )


def test_neighbours_in_the_order_are_alike() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 40)
    changes = {
        f"{group}{i}": {"w": centres[group] + 0.3 * torch.randn(40)}
        for i in range(3)
        for group in range(3)
    }
    found = reordered(similarity(changes))
    groups = [name[0] for name in found.tasks]
    assert sum(a != b for a, b in pairwise(groups)) == 2
    a, b, value = strongest(found, 1)[0]
    assert a[0] == b[0]
    assert value == max(found.values[i][j] for i in range(9) for j in range(9) if i != j)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="'w' in different shapes"):
        similarity({"a": {"w": A}, "b": {"w": B}})


@pytest.mark.parametrize("count", [1, 2, 6, 40])
def test_the_matrix_has_a_cell_for_every_two_tasks(count: int) -> None:
    torch.manual_seed(0)
    found = similarity({f"task {i}": {"w": torch.randn(20)} for i in range(count)})
    drawing = draw_matrix(found)
    texts = [m for m in drawing.marks if isinstance(m, Text)]
    assert sum(t.text == "1.00" for t in texts) == (count if count <= 28 else 0) + 1  # the legend
    boxes = [box for m in drawing.marks if isinstance(m, Rects) for box in m.boxes]
    assert all(x >= 0 and x + w <= drawing.width for x, _, w, _ in boxes)
    assert sum(level(v) > 0 for row in found.values for v in row) + 4 == len(boxes)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu())
        return out


def trained(plan: Callable[[nn.Module], weft.Sharing]) -> weft.MultiTaskModel:
    torch.manual_seed(0)
    base = Net()
    model = weft.MultiTaskModel(base, plan(base), example=torch.zeros(1, 4))
    model.add_task("t", weft.Classification(2))
    with torch.no_grad():
        for parameter in model.task_parameters("t"):
            parameter.add_(torch.randn_like(parameter))
    return model


def lora(base: nn.Module) -> weft.Sharing:
    return weft.lora(base, r=2)


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (weft.linear_probe, set()),
        (weft.bias_only, {"first.0.bias", "first.1.bias"}),
        (weft.full_finetune, set(dict(Net().named_parameters()))),
        (lora, {"first.0.weight", "first.0.bias", "last.weight"}),
    ],
)
def test_a_change_is_what_the_task_uses_minus_the_base(
    plan: Callable[[nn.Module], weft.Sharing], names: set[str]
) -> None:
    model = trained(plan)
    changes = changes_of(model, from_model(model)[0])
    assert set(changes) == names
    base, folded = dict(model.base.named_parameters()), dict(model.fold("t").named_parameters())
    for name, change in changes.items():
        size = base[name].double().norm() or 1.0
        torch.testing.assert_close(change * size, (folded[name] - base[name]).double())
