"""Cascades: who leaves where, what it costs, and how a threshold is chosen."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import weft
from weft.cascade import Cascade, Curve, Point, Resized, add_resolutions
from weft.cascade.curve import sweep
from weft.data.transforms import resize
from weft.errors import DataError, TaskError

SIZES = (4, 6, 8)


class Counting(nn.Sequential):
    """A convolutional base that counts the rows of each size that it computes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.rows: dict[int, int] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Counting:
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        for one, other in zip(self.modules(), copied.modules(), strict=True):
            for table in ("_parameters", "_buffers"):
                for key, tensor in getattr(one, table).items():
                    getattr(other, table)[key] = memo.get(id(tensor), tensor)
        copied.rows = self.rows  # one count for all copies
        return copied

    def forward(self, x: Tensor) -> Tensor:
        self.rows[x.shape[-1]] = self.rows.get(x.shape[-1], 0) + len(x)
        return super().forward(x)


def make(classes: int = 3) -> tuple[weft.MultiTaskModel, list[tuple[str, int]], Counting]:
    """A model with a task at each size; heads and patches differ, in float64."""
    base = Counting().double()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=images(1))
    stages = add_resolutions(model, "t", weft.Classification(classes), SIZES)
    model.double().eval()
    with torch.no_grad():
        for task, size in stages:
            for tensor in model.task_parameters(task):
                nn.init.normal_(tensor)
            head = model.head(task).linear
            features = model.view(task)(images(200, size))  # spread the confidences
            head.weight *= 2.0 / (features.std(0) + 1e-3)
            head.bias.copy_(-head.weight @ features.mean(0))
    base.rows.clear()
    return model.train(), stages, base


def images(rows: int = 40, size: int = 8) -> Tensor:
    return torch.randn(rows, 3, size, size, dtype=torch.float64)


def loader(rows: int = 40, batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(rows), torch.randint(0, 3, (rows,))) for _ in range(batches)]


def all_stages(
    model: weft.MultiTaskModel, stages: list[tuple[str, int]], x: Tensor
) -> list[Tensor]:
    """Every stage's logits for every row."""
    model.eval()
    with torch.no_grad():
        return [model(resize(x, size), task=task) for task, size in stages]


def probability(logits: Tensor) -> list[float]:
    """The largest class probability of each row, written out."""
    return (logits.exp().amax(1) / logits.exp().sum(1)).tolist()


def exits(confidence: list[list[float]], threshold: float) -> list[int]:
    """The definition: by row, the first stage with enough confidence, else the last."""
    return [
        next((k for k, c in enumerate(row[:-1]) if c >= threshold), len(row) - 1)
        for row in confidence
    ]


# ---------------------------------------------------------------------- running a cascade


def test_threshold_zero_is_the_first_stage_bit_for_bit() -> None:
    model, stages, base = make()
    x = images()
    answers = Cascade(model, stages, threshold=0.0)(x)
    assert base.rows == {4: 40}
    assert torch.equal(answers.output, all_stages(model, stages, x)[0])
    assert not answers.stage.any()


@pytest.mark.parametrize("threshold", [1.01, 2.0, float("inf")])
def test_a_threshold_over_one_is_the_last_stage_bit_for_bit(threshold: float) -> None:
    model, stages, base = make()
    x = images()
    answers = Cascade(model, stages, threshold)(x)
    assert base.rows == {4: 40, 6: 40, 8: 40}
    assert torch.equal(answers.output, all_stages(model, stages, x)[2])
    assert answers.stage.eq(2).all()


@pytest.mark.parametrize("threshold", [0.55, 0.65, 0.72])
def test_each_row_gets_the_answer_of_the_first_stage_that_is_sure(threshold: float) -> None:
    model, stages, base = make()
    x = images()
    answers = Cascade(model, stages, threshold)(x)
    rows = dict(base.rows)
    logits = all_stages(model, stages, x)
    table = [list(row) for row in zip(*map(probability, logits), strict=True)]
    left = exits(table, threshold)
    assert len(set(left)) == 3  # all stages have a part in it
    assert answers.stage.tolist() == left
    expected = torch.stack([logits[k][i] for i, k in enumerate(left)])
    assert torch.allclose(answers.output, expected, atol=1e-12)
    sure = torch.tensor([table[i][k] for i, k in enumerate(left)], dtype=torch.float64)
    assert torch.allclose(answers.confidence, sure, atol=1e-12)
    # Rows that left were not computed again.
    assert rows == {size: sum(k >= i for k in left) for i, size in enumerate(SIZES)}


def test_a_cascade_leaves_modes_and_statistics_and_leaves_no_graph() -> None:
    model, stages, _ = make()
    cascade, x = Cascade(model, stages, 0.6), images()
    expected = cascade(x)
    model.train()
    model.tasks["t@4"].eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    answers = cascade(x)
    assert torch.equal(answers.output, expected.output)
    assert not answers.output.requires_grad
    assert model.training
    assert not model.tasks["t@4"].training
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_images_larger_than_every_stage_are_resized_for_each() -> None:
    model, stages, _ = make()
    x = images(size=16)
    answers = Cascade(model, stages, threshold=0.0)(x)
    small = nn.functional.interpolate(x, (4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(answers.output, model.eval()(small, task="t@4"))


def test_one_task_may_be_run_at_several_sizes() -> None:
    model, _, _ = make()
    x = images()
    answers = Cascade(model, [("t@8", 4), ("t@8", 8)], threshold=2.0)(x)
    assert torch.equal(answers.output, model.eval()(x, task="t@8"))


# --------------------------------------------------------------------------------- costs


def test_multiply_adds_equal_the_formula() -> None:
    model, stages, _ = make()
    # 3x3 convolution from 3 to 4 channels without padding, then a 4 -> 3 head.
    expected = tuple((size - 2) ** 2 * 4 * 3 * 9 + 4 * 3 for size in SIZES)
    assert Cascade(model, stages).multiply_adds(images()) == expected
    assert weft.multiply_adds(model, images(5)).of("t@8") == 5 * expected[2]
    assert model.training


def test_multiply_adds_of_depthwise_layers_and_of_attention_equal_the_formula() -> None:
    base = nn.Sequential(nn.Conv2d(6, 12, 3, groups=6, padding=1), nn.Flatten(2))
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(None, nn.functional.mse_loss))
    assert weft.multiply_adds(model, torch.randn(1, 6, 5, 5)).of("a") == 25 * 12 * 9

    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = weft.MultiTaskModel(encoder, weft.linear_probe(encoder))
    model.add_task("a", weft.Task(None, nn.functional.mse_loss))
    tokens = 5
    projections, attention = tokens * 8 * 8 * 4, 2 * tokens * tokens * 8
    assert weft.multiply_adds(model, torch.randn(1, tokens, 8)).of("a") == (
        projections + attention + tokens * 2 * 8 * 12
    )


def test_a_cascade_costs_what_its_rows_went_through() -> None:
    model, stages, _ = make()
    cascade, data = Cascade(model, stages, 0.6), loader()
    costs = cascade.multiply_adds(data[0][0])
    scores = cascade.evaluate(data)
    with FlopCounterMode(display=False) as counter:
        stage = torch.cat([cascade(x).stage for x, _ in data])
    assert scores["multiply_adds"] == counter.get_total_flops() / 2 / 120
    assert scores["multiply_adds"] == sum(sum(costs[: k + 1]) for k in stage.tolist()) / 120
    assert scores["shares"] == tuple(int((stage == k).sum()) / 120 for k in range(3))
    right = sum(int((cascade(x).output.argmax(1) == y).sum()) for x, y in data)
    assert scores["accuracy"] == right / 120


# -------------------------------------------------------------------------------- curves


def test_the_curve_of_four_rows_by_hand() -> None:
    confidence = torch.tensor([[0.9, 0.5, 0.7], [0.5, 0.8, 0.9], [0.6, 0.6, 0.5], [0.5, 0.4, 0.6]])
    correct = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    curve = sweep(confidence.double(), correct, [1, 10, 100])
    cheap = [(p.accuracy, p.multiply_adds, p.shares) for p in curve.points]
    assert cheap == [
        (0.5, 1.0, (1.0, 0.0, 0.0)),  # t <= 0.5
        (1.0, (4 + 20 + 100) / 4, (0.5, 0.25, 0.25)),  # to 0.6: 1 to the second, 3 to the last
        (1.0, (4 + 30 + 200) / 4, (0.25, 0.25, 0.5)),  # to 0.8: also 2 to the last
        (1.0, (4 + 30 + 300) / 4, (0.25, 0.0, 0.75)),  # to 0.9
        (0.75, 111.0, (0.0, 0.0, 1.0)),
    ]
    assert [round(p.threshold, 6) for p in curve.points] == [0.0, 0.55, 0.7, 0.85, 2.0]


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("levels", [3, 1000])  # many ties, hardly any
def test_the_curve_holds_every_behaviour_once_and_agrees_with_the_definition(
    stages: int, levels: int
) -> None:
    rows, costs = 30, [3**k for k in range(stages)]
    confidence = (torch.rand(rows, stages) * levels).ceil().double() / levels
    correct = torch.rand(rows, stages) < 0.5
    curve = sweep(confidence, correct, costs)

    def by_definition(threshold: float) -> tuple[float, float, tuple[float, ...]]:
        left = exits(confidence.tolist(), threshold)
        right = sum(bool(correct[i, k]) for i, k in enumerate(left))
        spent = sum(sum(costs[: k + 1]) for k in left)
        shares = tuple(left.count(k) / rows for k in range(stages))
        return right / rows, spent / rows, shares

    found = [(p.accuracy, p.multiply_adds, p.shares) for p in curve.points]
    assert found == [by_definition(p.threshold) for p in curve.points]
    for threshold in [0.0, *confidence.flatten().tolist(), *torch.rand(20).tolist(), 2.0]:
        assert by_definition(threshold) in found
    assert all(a.threshold < b.threshold for a, b in pairwise(curve.points))
    assert all(a.multiply_adds < b.multiply_adds for a, b in pairwise(curve.points))


def test_neighbouring_numbers_are_told_apart() -> None:
    low = 0.5
    confidence = torch.tensor([[low, 1.0], [math.nextafter(low, 1.0), 1.0]], dtype=torch.float64)
    curve = sweep(confidence, torch.tensor([[True, False], [True, False]]), [1, 10])
    assert [p.shares for p in curve.points] == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    left = exits(confidence.tolist(), curve.points[1].threshold)
    assert left == [1, 0]


def test_the_curve_says_what_the_cascade_then_does() -> None:
    model, stages, _ = make()
    cascade, data = Cascade(model, stages), loader()
    curve = cascade.curve(data)
    assert len(curve.points) > 50
    for point in curve.points[:: len(curve.points) // 7] + curve.points[-1:]:
        assert cascade.at(point.threshold).evaluate(data) == {
            "accuracy": point.accuracy,
            "multiply_adds": point.multiply_adds,
            "shares": point.shares,
        }


def test_a_threshold_is_chosen_within_a_budget_or_a_tolerance() -> None:
    costs = (1.0, 2.0, 3.0, 4.0, 5.0)
    accuracies = (0.60, 0.70, 0.69, 0.70, 0.68)
    points = tuple(
        Point(i / 10, a, c, ()) for i, (a, c) in enumerate(zip(accuracies, costs, strict=True))
    )
    curve = Curve(points)
    assert curve.most_accurate(budget=1.5) is points[0]
    assert curve.most_accurate(budget=2.0) is points[1]
    assert curve.most_accurate(budget=9.0) is points[1]  # of equally accurate ones the cheaper
    assert curve.cheapest() is points[1]  # 0.70 is no worse than the last stage's 0.68
    assert curve.cheapest(tolerance=0.07) is points[1]
    assert curve.cheapest(tolerance=0.09) is points[0]
    with pytest.raises(DataError, match=r"No threshold keeps to 0\.5 multiply-adds.*costs 1"):
        curve.most_accurate(budget=0.5)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("stages", "threshold", "complaint"),
    [
        ([("t@4", 4)], 0.5, "two stages or more"),
        ([("t@8", 8), ("t@4", 4)], 0.5, "from small to large"),
        ([("t@4", 0), ("t@8", 8)], 0.5, "from small to large"),
        ([("t@4", 4), ("t@9", 8)], 0.5, "no task 't@9'"),
        ([("t@4", 4), ("t@8", 8)], -0.1, "a number >= 0, found -0.1"),
        ([("t@4", 4), ("t@8", 8)], float("nan"), "a number >= 0, found nan"),
    ],
)
def test_wrong_cascades_are_refused(
    stages: list[tuple[str, int]], threshold: float, complaint: str
) -> None:
    model, _, _ = make()
    with pytest.raises(TaskError, match=complaint):
        Cascade(model, stages, threshold)


def test_stages_without_logits_or_with_other_classes_are_refused() -> None:
    model, _, _ = make()
    model.add_task("number", weft.Regression())
    model.add_task("more", weft.Classification(5))
    model.double()
    with pytest.raises(TaskError, match=r"logits \(rows, classes\); 'number' does not"):
        Cascade(model, [("t@4", 4), ("number", 8)], 2.0)(images())
    with pytest.raises(TaskError, match="'more' has 5, the first one 3"):
        Cascade(model, [("t@4", 4), ("more", 8)], 2.0)(images())


def test_no_images_and_no_data_are_refused() -> None:
    model, stages, _ = make()
    cascade = Cascade(model, stages)
    with pytest.raises(DataError, match=r"floats N x C x H x W, found torch.uint8 of shape"):
        cascade(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="floats N x C x H x W, found dict"):
        cascade.evaluate([({"x": images(2)}, torch.zeros(2))])
    for run in (cascade.evaluate, cascade.curve):
        with pytest.raises(DataError, match="data of the cascade is empty"):
            run([])
    with pytest.raises(DataError, match="Some outputs of the stages are NaN"):
        cascade.curve([(images(2) * float("nan"), torch.zeros(2))])


def test_a_row_that_is_not_a_number_never_counts_as_sure() -> None:
    model, stages, base = make()
    x = images(3)
    x[1] = float("nan")
    assert Cascade(model, stages, 0.0)(x).stage.tolist() == [0, 2, 0]
    assert base.rows == {4: 3, 6: 1, 8: 1}


# -------------------------------------------------------------------------- from end to end


def brightness(rows: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Images whose class is their brightness, with noise that small images average away."""
    found = []
    for _ in range(batches):
        y = torch.randint(0, 3, (rows,))
        found.append((0.6 * torch.randn(rows, 3, 8, 8) + y.view(-1, 1, 1, 1) - 1.0, y))
    return found


def test_training_at_several_sizes_choosing_on_validation_and_reporting_on_test() -> None:
    train, val, test = brightness(24, 4), brightness(40, 2), brightness(40, 2)
    base = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    plan = weft.scale_bias(base, train_base=True)
    model = weft.MultiTaskModel(base, plan, example=train[0][0])
    stages = add_resolutions(model, "shade", weft.Classification(3), (4, 8))
    data = {task: (Resized(train, size), Resized(val, size)) for task, size in stages}
    weft.fit(model, data, epochs=4, lr=0.1, progress=False)
    cascade = Cascade(model, stages)
    curve = cascade.curve(val)
    chosen = cascade.at(curve.cheapest(tolerance=0.05).threshold)
    scores, last = chosen.evaluate(test), cascade.at(2.0).evaluate(test)
    alone = weft.evaluate(model, {"shade@8": Resized(test, 8)})["shade@8"]["accuracy"]
    assert last["accuracy"] == pytest.approx(alone)
    assert alone > 0.6
    assert scores["accuracy"] >= alone - 0.15
    assert scores["multiply_adds"] < last["multiply_adds"]
