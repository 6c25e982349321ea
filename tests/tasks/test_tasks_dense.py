"""Depth, normals, numbers and classes per pixel: which pixels count, and formulas written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.errors import DataError
from weft.tasks import DilatedBranches
from weft.tasks.normals import angles

Batch = tuple[Tensor, Tensor]


def measured(task: weft.Task, *batches: Batch) -> dict[str, float]:
    """The task's metrics over some batches."""
    metrics = copy.deepcopy(dict(task.metrics))
    for metric in metrics.values():
        metric.reset()
        for output, target in batches:
            metric.update(output, target)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def unit(*shape: int) -> Tensor:
    """Random unit vectors along the second axis."""
    return F.normalize(torch.randn(shape), dim=1)


def holes(rows: int) -> Tensor:
    """(rows, 1, 4, 5): which pixels are unknown, some and not all of every row."""
    unknown = torch.rand(rows, 1, 4, 5) < 0.4
    unknown[..., 0, 0], unknown[..., 0, 1] = True, False
    return unknown


def depths(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets and unknown pixels of depth."""
    unknown = holes(rows)
    known = 0.5 + 3 * torch.rand(rows, 1, 4, 5)
    return 4 * torch.rand(rows, 1, 4, 5) - 0.5, known.masked_fill(unknown, 0.0), unknown


def numbers(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets and unknown pixels of one number per pixel."""
    unknown = holes(rows)
    return torch.randn(rows, 1, 4, 5), torch.randn(rows, 1, 4, 5).masked_fill(unknown, 255), unknown


def normals(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, unit vectors and unknown pixels of normals."""
    unknown = holes(rows)
    return torch.randn(rows, 3, 4, 5), unit(rows, 3, 4, 5).masked_fill(unknown, 0.0), unknown


def raw_normals(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, raw picture values and unknown pixels of normals; one channel marks a pixel."""
    unknown = holes(rows)
    target = torch.randint(0, 255, (rows, 3, 4, 5))
    target[:, 1:2][unknown] = 255
    return torch.randn(rows, 3, 4, 5), target, unknown


def classes(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and unknown pixels of classes."""
    unknown = holes(rows)
    labels = torch.randint(0, 3, (rows, 4, 5)).masked_fill(unknown[:, 0], 255)
    return torch.randn(rows, 3, 4, 5), labels, unknown


Make = Callable[[int], tuple[Tensor, Tensor, Tensor]]
CASES: dict[str, tuple[weft.Task, Make]] = {
    "depth": (weft.Depth(), depths),
    "depth as published": (weft.Depth(variant="adashare"), depths),
    "numbers": (weft.DenseRegression(invalid=255), numbers),
    "normals": (weft.SurfaceNormals(), normals),
    "raw normals": (weft.SurfaceNormals(encoding="adashare"), raw_normals),
    "classes": (weft.Segmentation(3), classes),
    "classes as published": (weft.Segmentation(3, variant="adashare"), classes),
}
every_case = pytest.mark.parametrize("case", CASES)
# These take the mean of batches, so they depend on how rows fall into batches.
pooled_case = pytest.mark.parametrize("case", [c for c in CASES if "published" not in c])


# --------------------------------------------------------------------------- all dense tasks


@every_case
def test_unknown_pixels_change_neither_loss_nor_gradient_nor_metrics(case: str) -> None:
    task, make = CASES[case]
    output, target, unknown = make(3)
    other = torch.where(unknown, 100 * torch.randn_like(output), output)
    leaf = output.clone().requires_grad_()
    task.loss(leaf, target).backward()
    assert leaf.grad is not None
    assert not bool(leaf.grad.masked_select(unknown).any())
    assert bool(leaf.grad.masked_select(~unknown).any())
    assert torch.equal(task.loss(other, target), task.loss(output, target))
    assert measured(task, (other, target)) == measured(task, (output, target))


@every_case
def test_a_batch_without_a_known_pixel_has_no_loss_and_no_gradient(case: str) -> None:
    task, make = CASES[case]
    output, target, _ = make(2)
    empty = torch.full_like(target, 0 if case.startswith(("depth", "normals")) else 255)
    leaf = output.clone().requires_grad_()
    loss = task.loss(leaf, empty)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())
    assert measured(task, (output, target), (output, empty)) == measured(task, (output, target))
    assert all(math.isnan(value) for value in measured(task, (output, empty)).values())


@every_case
def test_outputs_of_another_size_are_resized_bilinearly_to_the_targets(case: str) -> None:
    task, make = CASES[case]
    _, target, _ = make(2)
    small = torch.randn(2, 3 if "normals" in case or "classes" in case else 1, 2, 3)
    large = F.interpolate(small, size=(4, 5), mode="bilinear", align_corners=False)
    assert torch.equal(task.loss(small, target), task.loss(large, target))
    assert measured(task, (small, target)) == measured(task, (large, target))


@pooled_case
def test_metrics_do_not_depend_on_how_rows_fall_into_batches(case: str) -> None:
    task, make = CASES[case]
    output, target, _ = make(6)
    whole = measured(task, (output, target))
    for size in (1, 4):
        parts = zip(output.split(size), target.split(size), strict=True)
        assert measured(task, *parts) == pytest.approx(whole, rel=1e-5)


@every_case
def test_half_precision_is_measured_in_single(case: str) -> None:
    task, make = CASES[case]
    output, target, _ = make(2)
    half = output.bfloat16()
    assert task.loss(half, target).dtype == torch.float32
    assert torch.equal(task.loss(half, target), task.loss(half.float(), target))
    assert measured(task, (half, target)) == measured(task, (half.float(), target))


@pytest.mark.parametrize(
    ("task", "channels", "target", "complaint"),
    [
        (weft.Depth(), 1, (2, 2, 4, 4), r"\(2, 1, H, W\) or \(2, H, W\), found \(2, 2, 4, 4\)"),
        (weft.Depth(), 1, (3, 1, 4, 4), r"found \(3, 1, 4, 4\)"),
        (weft.Depth(), 1, (2,), r"found \(2,\)"),
        (weft.DenseRegression(2), 2, (2, 4, 4), r"\(2, 2, H, W\), found \(2, 4, 4\)"),
        (weft.SurfaceNormals(), 3, (2, 4, 4, 3), r"\(2, 3, H, W\), found \(2, 4, 4, 3\)"),
    ],
)
def test_targets_of_a_wrong_shape_are_refused(
    task: weft.Task, channels: int, target: tuple[int, ...], complaint: str
) -> None:
    assert task.check is not None
    with pytest.raises(DataError, match=complaint):
        task.check(torch.zeros(2, channels, 2, 2), torch.zeros(target))


@pytest.mark.parametrize(
    ("task", "target", "complaint"),
    [
        (weft.DenseRegression(invalid=9), torch.full((1, 4, 4), math.nan), "NaN or infinity"),
        (weft.SurfaceNormals(), torch.full((1, 3, 4, 4), 255.0), "found floats up to 255"),
        (weft.SurfaceNormals(), torch.full((1, 3, 4, 4), 256), r"0\.\.255, found 256\.\.256"),
        (
            weft.SurfaceNormals(encoding="adashare"),
            torch.rand(1, 3, 4, 4),
            "raw values.*encoding='decoded'",
        ),
        (weft.SurfaceNormals(encoding="adashare"), unit(1, 3, 4, 4), "raw values"),
    ],
)
def test_targets_in_a_wrong_encoding_are_refused(
    task: weft.Task, target: Tensor, complaint: str
) -> None:
    assert task.check is not None
    output = torch.zeros(1, 1 if target.dim() == 3 else 3, 2, 2)
    with pytest.raises(DataError, match=complaint):
        task.check(output, target)


@every_case
def test_right_targets_pass(case: str) -> None:
    task, make = CASES[case]
    output, target, _ = make(2)
    assert task.check is not None
    task.check(output, target)
    task.check(output[..., :2, :2], target)


# ------------------------------------------------------------------------------------- heads


def test_the_aspp_head_is_the_sum_of_its_branches_at_the_size_of_the_map() -> None:
    make = weft.Depth(head="aspp").head
    assert make is not None
    x = torch.randn(2, 5, 3, 4)
    made = make(x).eval()
    assert isinstance(made, DilatedBranches)
    assert torch.allclose(made(x), sum(branch(x) for branch in made.branches), atol=1e-6)
    assert made(x).shape == (2, 1, 3, 4)
    first = [branch[0] for branch in made.branches]
    assert [conv.dilation for conv in first] == [(6, 6), (12, 12), (18, 18), (24, 24)]


def test_the_aspp_head_has_the_parameters_of_the_published_one() -> None:
    with torch.device("meta"):
        made = DilatedBranches(512, 3)
    branch = (9 * 512 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 3
    assert sum(p.numel() for p in made.parameters()) == 4 * branch == 23_089_164


def test_dense_tasks_come_back_from_a_bank(tmp_path: object) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    example = torch.randn(1, 3, 6, 6)
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=example)
    for name, task in {
        "depth": weft.Depth(minimum=0.1),
        "normals": weft.SurfaceNormals(head="aspp"),
        "edges": weft.DenseRegression(2, invalid=255.0),
    }.items():
        model.add_task(name, task)
    weft.Bank(str(tmp_path)).save(model)
    again = weft.Bank(str(tmp_path)).load(base)
    expected = model.eval().predict_all(example)
    for name, output in again.eval().predict_all(example).items():
        assert torch.equal(output, expected[name])
        assert again.tasks[name].task.spec == model.tasks[name].task.spec


# ------------------------------------------------------------------------------------- depth


def test_depth_metrics_are_their_formulas_over_all_known_pixels() -> None:
    d, g, unknown = depths(6)
    d, known = d.abs(), ~unknown
    pairs = list(zip(d[known].tolist(), g[known].tolist(), strict=True))
    ratios = [max(a / b, b / a) for a, b in pairs]
    expected = {
        "abs_error": sum(abs(a - b) for a, b in pairs) / len(pairs),
        "rel_error": sum(abs(a - b) / b for a, b in pairs) / len(pairs),
        **{f"delta_{t}": sum(r < 1.25**t for r in ratios) / len(pairs) for t in (1, 2, 3)},
    }
    assert measured(weft.Depth(), (d, g)) == pytest.approx(expected, rel=1e-5)
    published = measured(weft.Depth(variant="adashare"), (d, g))
    assert published == pytest.approx(expected, rel=1e-5)  # one batch of positive depths
    loss = float(weft.Depth().loss(d, g))
    assert loss == pytest.approx(expected["abs_error"], rel=1e-5)


def test_depths_that_are_not_positive_pass_no_test_of_ratios_but_the_published_one() -> None:
    g = torch.ones(1, 1, 1, 4)
    d = torch.tensor([-1.0, -9.0, 0.0, 1.0]).view(1, 1, 1, 4)
    deltas = ("delta_1", "delta_2", "delta_3")
    standard, published = (
        measured(weft.Depth(), (d, g)),
        measured(CASES["depth as published"][0], (d, g)),
    )
    assert [standard[name] for name in deltas] == [0.25] * 3
    assert [published[name] for name in deltas] == [0.75] * 3


def test_a_ratio_at_the_limit_passes_the_published_test_only() -> None:
    d, g = torch.full((1, 1, 1, 1), 1.25), torch.ones(1, 1, 1, 1)
    assert measured(weft.Depth(), (d, g))["delta_1"] == 0.0
    assert measured(weft.Depth(variant="adashare"), (d, g))["delta_1"] == 1.0


def test_published_depth_errors_are_means_of_batches_by_rows() -> None:
    one = torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), 1.0)
    three = torch.full((3, 1, 1, 4), 2.0), torch.zeros(3, 1, 1, 4)
    three[1][0, 0, 0, 0] = 4.0  # a single known pixel
    found = measured(weft.Depth(variant="adashare"), one, three)
    assert found["abs_error"] == pytest.approx((1 * 1 + 3 * 2) / 4)
    assert found["rel_error"] == pytest.approx((1 * 1 + 3 * 0.5) / 4)
    pooled = measured(weft.Depth(), one, three)
    assert pooled["abs_error"] == pytest.approx((4 * 1 + 1 * 2) / 5)


@pytest.mark.parametrize("unknown", [0.0, -1.0, 0.5, math.nan, math.inf])
def test_depths_are_known_where_finite_and_above_the_minimum(unknown: float) -> None:
    task = weft.Depth(minimum=0.5)
    output, target = torch.ones(1, 1, 1, 2), torch.tensor([unknown, 3.0]).view(1, 1, 2)
    assert float(task.loss(output, target)) == 2.0
    assert measured(task, (output, target))["abs_error"] == 2.0


# ----------------------------------------------------------------------------------- numbers


def test_dense_regression_is_the_mean_absolute_error_of_every_number_without_a_mark() -> None:
    output, target = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    expected = float((output - target).abs().mean())
    task = weft.DenseRegression(2)
    assert float(task.loss(output, target)) == pytest.approx(expected)
    assert measured(task, (output, target)) == {"mae": pytest.approx(expected)}


def test_targets_of_one_channel_may_leave_out_the_axis() -> None:
    task = weft.DenseRegression(invalid=255)
    output, target, _ = numbers(2)
    assert torch.equal(task.loss(output, target[:, 0]), task.loss(output, target))
    assert measured(task, (output, target[:, 0])) == measured(task, (output, target))


# ----------------------------------------------------------------------------------- normals


def test_normals_lose_one_minus_the_mean_cosine_whatever_the_length() -> None:
    task, make = CASES["normals"]
    output, target, unknown = make(3)
    known = ~unknown[:, 0]
    cosine = (output * target).sum(1) / output.norm(dim=1)
    assert float(task.loss(output, target)) == pytest.approx(float(1 - cosine[known].mean()))
    assert torch.allclose(task.loss(7 * output, target), task.loss(output, target))


def test_angles_are_arc_cosines() -> None:
    u, v = torch.randn(200, 3).double(), torch.randn(200, 3).double()
    cosine = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))
    assert torch.allclose(angles(u, v), cosine.arccos().rad2deg())


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.1, 89.99, 179.99, 180.0])
def test_small_angles_are_exact_in_single_precision(degrees: float) -> None:
    radians = math.radians(degrees)
    turned = torch.tensor([[math.cos(radians), math.sin(radians), 0.0]])
    assert float(angles(turned, torch.tensor([[1.0, 0, 0]]))) == pytest.approx(degrees, abs=2e-5)


def test_a_normal_of_zero_is_at_a_right_angle() -> None:
    assert float(angles(torch.zeros(1, 3), unit(1, 3))) == pytest.approx(90.0)


def test_angle_metrics_are_their_formulas_over_all_known_pixels() -> None:
    task, make = CASES["normals"]
    output, target, unknown = make(6)
    output = target + 0.5 * output
    cosine = (output * target).sum(1) / output.norm(dim=1)
    angle = cosine[~unknown[:, 0]].double().clamp(-1, 1).arccos().rad2deg()
    found = measured(task, (output, target))
    assert found["mean_angle"] == pytest.approx(float(angle.mean()), rel=1e-4)
    assert found["median_angle"] == pytest.approx(float(angle.quantile(0.5)), abs=0.0101)
    for limit in (11.25, 22.5, 30):
        share = float((angle <= limit).double().mean())
        assert found[f"within_{limit:g}"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("degrees", "median"), [((0, 90), 45), ((10, 20, 170), 20), ((180, 180), 180), ((1,), 1)]
)
def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two(
    degrees: tuple[float, ...], median: float
) -> None:
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    output = torch.stack([turn.cos(), turn.sin(), 0 * turn])[None, :, None]
    target = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 1, len(degrees))
    found = measured(weft.SurfaceNormals(), (output, target))
    assert found["median_angle"] == pytest.approx(median, abs=0.0101)


def test_pictures_are_decoded_to_the_vectors_that_they_show() -> None:
    vectors = unit(4, 3, 5, 5)
    picture = ((vectors + 1) / 2 * 255).round().to(torch.uint8)
    for dtype in (torch.uint8, torch.int64):
        found = measured(weft.SurfaceNormals(), (vectors, picture.to(dtype)))
        assert 0 < found["mean_angle"] < 0.5


def test_normals_that_are_not_decoded_lie_in_one_octant() -> None:
    a, b = (((unit(4, 3, 5, 5) + 1) / 2 * 254).round() for _ in range(2))
    raw = measured(weft.SurfaceNormals(encoding="adashare"), (a, b))
    angle = F.cosine_similarity(a, b).double().arccos().rad2deg()
    assert raw["mean_angle"] == pytest.approx(float(angle.mean()), rel=1e-4)
    decoded = measured(weft.SurfaceNormals(), (a / 127.5 - 1, b.long()))
    assert decoded["mean_angle"] > 1.5 * raw["mean_angle"]


@pytest.mark.parametrize(
    "mark",
    [
        torch.zeros(3),
        torch.full((3,), math.nan),
        torch.tensor([0, 0, 0]),
        torch.tensor([128, 128, 128]),
        torch.tensor([255, 255, 255]),
    ],
)
def test_pixels_far_from_unit_length_are_unknown(mark: Tensor) -> None:
    facing = torch.tensor([0.0, 0.0, 1.0])
    if not mark.is_floating_point():
        facing = torch.tensor([128, 128, 255])  # one component is 255, and known
    target = torch.stack([mark, facing], 1).view(1, 3, 1, 2)
    output = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).T.reshape(1, 3, 1, 2)
    assert float(weft.SurfaceNormals().loss(output, target)) == pytest.approx(0.0, abs=1e-4)
    assert measured(weft.SurfaceNormals(), (output, target))["mean_angle"] < 0.5


# ----------------------------------------------------------------------------------- classes


def one_hot(predicted: list[int]) -> Tensor:
    """Logits (1, 3, 1, n) whose largest is the prediction."""
    return F.one_hot(torch.tensor([[predicted]]), 3).permute(0, 3, 1, 2).float()


def test_a_class_that_is_never_right_counts_as_zero_but_not_in_the_published_mean() -> None:
    # Class 0: one hit in a union of two; class 1 occurs and is never right; class 2 is absent.
    batch = one_hot([0, 0, 0]), torch.tensor([[[0, 1, 255]]])
    assert measured(weft.Segmentation(3), batch)["miou"] == pytest.approx((0.5 + 0) / 2)
    published = measured(weft.Segmentation(3, variant="adashare"), batch)
    assert published["miou"] == pytest.approx(0.5)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    batch = one_hot([0, 2]), torch.tensor([[[0, 0]]])
    assert measured(weft.Segmentation(3), batch)["miou"] == pytest.approx((0.5 + 0) / 2)


def test_void_below_zero_is_wrong_in_the_published_pixel_accuracy_only() -> None:
    for void, published in ((-1, 1 / 3), (255, 1 / 2)):
        batch = one_hot([0, 0, 0]), torch.tensor([[[0, 1, void]]])
        standard = measured(weft.Segmentation(3, ignore=void), batch)
        other = measured(weft.Segmentation(3, ignore=void, variant="adashare"), batch)
        assert standard["pixel_accuracy"] == pytest.approx(1 / 2)
        assert other["pixel_accuracy"] == pytest.approx(published)
        assert other["miou"] == pytest.approx(1 / 2)


def test_published_pixel_accuracy_is_a_mean_of_batches_by_rows() -> None:
    one = one_hot([0, 0, 0, 0]), torch.tensor([[[0, 0, 0, 0]]])
    three = one_hot([0, 0]).expand(3, 3, 1, 2), torch.tensor([[[0, 1]]]).expand(3, 1, 2)
    found = measured(weft.Segmentation(3, variant="adashare"), one, three)
    assert found["pixel_accuracy"] == pytest.approx((1 * 1 + 3 * 0.5) / 4)
    assert measured(weft.Segmentation(3), one, three)["pixel_accuracy"] == pytest.approx(7 / 10)
