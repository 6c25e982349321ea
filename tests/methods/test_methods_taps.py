"""TAPS: gradients of gates, the dynamics of scores, and the two forms that compute the same."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.core.patch import Replace
from weft.errors import PlanError
from weft.patches import gated
from weft.patches.gated import GatedResidual, GatedTuned
from weft.penalties import L1Scores

NO_HEAD = weft.Task(head=None, loss=nn.functional.mse_loss)


def linear() -> nn.Sequential:
    """One gated layer and a normalisation, in double precision."""
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()


def model_of(base: nn.Module, **options: object) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, weft.taps(base, **options))
    model.add_task("a", NO_HEAD)
    return model


def set_gates(model: weft.MultiTaskModel, value: float) -> None:
    for key, tensor in model.trainable("a").items():
        if key.endswith(":score"):
            with torch.no_grad():
                tensor.fill_(value)


def move_layers(model: weft.MultiTaskModel) -> None:
    generator = torch.Generator().manual_seed(5)
    for key, tensor in sorted(model.trainable("a").items()):
        if key.endswith((":tuned", ":residual")):
            with torch.no_grad():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


@pytest.mark.parametrize("form", ["tuned", "residual"])
@pytest.mark.parametrize(("score", "move"), [(0.15, False), (0.05, True), (0.15, True)])
def test_output_is_the_base_unless_a_gate_is_open_on_a_difference(
    form: str, score: float, move: bool
) -> None:
    base = linear().eval()
    model = model_of(base, form=form).eval()
    set_gates(model, score)
    if move:
        move_layers(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    same = torch.equal(model(x, task="a"), base(x))
    assert same == (not (move and score >= 0.1))


@pytest.mark.parametrize("form", ["tuned", "residual"])
def test_a_gate_at_the_threshold_is_open(form: str) -> None:
    for dtype in (torch.float32, torch.float64):
        base = linear().to(dtype)
        model = model_of(base, form=form).eval()
        move_layers(model)
        set_gates(model, 0.1)
        x = torch.randn(5, 4, dtype=dtype)
        assert not torch.equal(model(x, task="a"), base.eval()(x))
        assert model.ledger("a").open_gates == (1, 1)
        set_gates(model, 0.0999)
        assert model.ledger("a").open_gates == (0, 1)


def gradients(model: weft.MultiTaskModel, x: Tensor, penalty: float = 0.0) -> dict[str, Tensor]:
    """Gradients of the task loss by key, and of the penalty if asked for."""
    parameters = model.trainable("a")
    loss = model(x, task="a").pow(3).sum() + penalty * model.penalty("a")
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("form", ["tuned", "residual"])
def test_a_closed_gate_stops_the_layer_and_not_the_score(form: str) -> None:
    model = model_of(linear(), form=form)
    move_layers(model)
    set_gates(model, 0.05)
    found = gradients(model, torch.randn(5, 4, dtype=torch.float64))
    assert not bool(found[f"0.weight:{form}"].any())
    assert not bool(found[f"0.bias:{form}"].any())
    assert float(found["0:score"]) != 0.0


@pytest.mark.parametrize("form", ["tuned", "residual"])
def test_at_the_start_only_the_penalty_moves_the_score(form: str) -> None:
    model = model_of(linear(), form=form, penalty=0.7)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert float(gradients(model, x)["0:score"]) == 0.0
    assert float(gradients(model, x, 1.0)["0:score"]) == pytest.approx(0.7)
    assert bool(gradients(model, x)[f"0.weight:{form}"].any())


@pytest.mark.parametrize("score", [0.05, 0.15])
@pytest.mark.parametrize("form", ["tuned", "residual"])
def test_gradients_equal_the_formulas(form: str, score: float) -> None:
    """dL/dD = g G and dL/ds = <G, D> summed over the layer, with G = dL/dE."""
    base = linear()
    model = model_of(base, form=form)
    move_layers(model)
    set_gates(model, score)
    x = torch.randn(5, 4, dtype=torch.float64)
    effective = {n: t.detach().requires_grad_() for n, t in model.tensors("a").items()}
    loss = torch.func.functional_call(base, effective, (x,)).pow(3).sum()
    names = ["0.weight", "0.bias"]
    expected = dict(
        zip(names, torch.autograd.grad(loss, [effective[n] for n in names]), strict=True)
    )
    own = model.tasks["a"].own
    found = gradients(model, x)
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        difference = own[f"{name}:{form}"].detach()
        if form == "tuned":
            difference = difference - dict(base.named_parameters())[name].detach()
        gate = 1.0 if score >= 0.1 else 0.0
        assert torch.allclose(found[f"{name}:{form}"], gate * expected[name], atol=1e-12)
        total += (expected[name] * difference).sum()
    assert torch.allclose(found["0:score"], total, atol=1e-12)


def test_the_forms_agree_in_outputs_gradients_and_after_hardening() -> None:
    base = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False)
    ).double()
    tuned, residual = model_of(base, form="tuned"), model_of(base, form="residual")
    values = dict(base.named_parameters())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "3.weight"):
            moved = 0.1 * torch.randn(values[name].shape, generator=generator, dtype=torch.float64)
            residual.tasks["a"].own[f"{name}:residual"].copy_(moved)
            tuned.tasks["a"].own[f"{name}:tuned"].copy_(values[name] + moved)
        for model in (tuned, residual):
            model.tasks["a"].own["3:score"].fill_(0.02)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert torch.allclose(tuned(x, task="a"), residual(x, task="a"), atol=1e-12)
    one, other = gradients(tuned, x, 1.0), gradients(residual, x, 1.0)
    assert len(one) == len(other) == 7
    for key, gradient in one.items():
        partner = other[key.replace(":tuned", ":residual")]
        assert torch.allclose(gradient, partner, atol=1e-10), key
    outputs = []
    for model in (tuned.eval(), residual.eval()):
        model.harden("a")
        assert set(model.tasks["a"].patches) == set(model.tasks["a"].own)
        assert all(isinstance(p, Replace) for p in model.tasks["a"].patches.values())
        outputs.append(model(x, task="a"))
    assert torch.allclose(*outputs, atol=1e-12)


def test_the_residual_form_passes_gradients_to_a_training_base() -> None:
    base, tensors = torch.randn(3, 2, requires_grad=True), new(GatedResidual("s"))
    for score in (0.15, 0.05):
        tensors["s"].data.fill_(score)
        gradient = torch.randn(3, 2)
        GatedResidual("s").compose("w", base, tensors).backward(gradient)
        assert torch.equal(base.grad, gradient)
        base.grad = None


def new(patch: GatedResidual | GatedTuned) -> dict[str, Tensor]:
    return patch.init("w", torch.randn(3, 2))


@pytest.mark.parametrize("patch", [GatedTuned("s"), GatedResidual("s")])
def test_open_gates_pass_gradcheck(patch: GatedResidual | GatedTuned) -> None:
    base = torch.randn(3, 2, dtype=torch.float64)
    score = torch.tensor(0.15, dtype=torch.float64)
    key = patch.keys("w")[0]

    def effective(own: Tensor) -> Tensor:
        return patch.compose("w", base, {key: own, "s": score}).sin()

    own = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(effective, (own,))
    assert torch.autograd.gradgradcheck(effective, (own,))


@pytest.mark.parametrize("size", [10, gated.SMALL, gated.SMALL + 1, 3 * gated.SMALL - 7])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_score_gradient_is_right_for_any_size_and_layout(size: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(2, size, generator=generator)
    tuned = nn.Parameter(base + 1e-3 * torch.randn(2, size, generator=generator))
    weights = torch.randn(2, size, generator=generator)
    if layout == "transposed":
        base, weights = base.t().contiguous().t(), weights.t().contiguous().t()
    score = nn.Parameter(torch.tensor(0.05))
    tensors: Mapping[str, Tensor] = {"w:tuned": tuned, "s": score}
    (GatedTuned("s").compose("w", base, tensors) * weights).sum().backward()
    exact = (weights.double() * (tuned.double() - base.double())).sum()
    scale = (weights.double() * (tuned.double() - base.double())).norm()
    rounding = 3e-8 * weights.double().norm() * tuned.double().norm()  # of two dot products
    allowed = 1e-3 * scale + (rounding if size > gated.SMALL else 0.0)
    assert abs(float(score.grad) - float(exact.detach())) < float(allowed.detach())


# Optimiser steps until a gate without task gradient closes: N = 52, momentum 0.9, gradients of
# 8 micro-batches summed (specification of TAPS, A.5).
FLIPS = {
    0.01: {0.1: 42, 0.3: 19, 0.5: 14, 1.0: 9},
    0.005: {0.1: 74, 0.3: 31, 0.5: 22, 1.0: 14},
    0.001: {0.1: 334, 0.3: 118, 0.5: 74, 1.0: 42},
}


@pytest.mark.parametrize(
    ("lr", "weight", "expected"), [(lr, w, n) for lr, row in FLIPS.items() for w, n in row.items()]
)
def test_gates_close_after_the_published_number_of_steps(
    lr: float, weight: float, expected: int
) -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    model = model_of(base, penalty=weight, legacy_norm=52)
    score = model.trainable("a")["0:score"]
    optimizer = torch.optim.SGD([score], lr=lr, momentum=0.9)
    steps = 0
    while float(score.detach()) >= 0.1:
        optimizer.zero_grad()
        for _ in range(8):
            model.penalty("a").backward()
        optimizer.step()
        steps += 1
    assert abs(steps - expected) <= 1


def test_the_penalty_is_the_mean_absolute_score_of_each_task() -> None:
    base = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model = model_of(base, penalty=0.4)
    model.add_task("b", NO_HEAD)
    with torch.no_grad():
        model.tasks["a"].own["0:score"].fill_(-0.3)
        model.tasks["a"].own["1:score"].fill_(0.5)
    assert float(model.penalty("a").detach()) == pytest.approx(0.4 * 0.8 / 2)
    batch = torch.randn(2, 2)
    together = model.step({"a": batch, "b": batch}).penalty.detach()
    assert float(together) == pytest.approx(0.4 * (0.8 + 0.3) / 2)
    model.harden("a")
    assert float(model.penalty("a")) == 0.0


def test_a_penalty_without_scores_is_zero() -> None:
    nothing = L1Scores(1.0, ("s",), (1.0,))
    assert float(nothing({}, {"a": {}}, {})) == 0.0


def test_without_a_price_gates_stay_open_and_with_a_high_one_the_patch_is_scale_and_bias() -> None:
    base = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    counts = {}
    for price in (0.0, 1000.0):
        model = model_of(base, penalty=price)
        optimizer = torch.optim.SGD(model.task_parameters("a"), lr=1e-3)
        for _ in range(5):
            step = model.step({"a": torch.randn(4, 2, 8, 8)})
            optimizer.zero_grad()
            (step.outputs["a"].square().mean() + step.penalty).backward()
            optimizer.step()
        counts[price] = model.ledger("a").own_parameters
    assert counts[0.0] == sum(p.numel() for p in base.parameters())
    assert counts[1000.0] == 8


def test_momentum_moves_a_closed_layer_for_some_steps() -> None:
    model = model_of(linear())
    move_layers(model)
    weight = model.trainable("a")["0.weight:tuned"]
    optimizer = torch.optim.SGD(model.task_parameters("a"), lr=0.01, momentum=0.9)
    x = torch.randn(5, 4, dtype=torch.float64)
    moves = []
    for score in (0.15, 0.05, 0.05):
        set_gates(model, score)
        before = weight.detach().clone()
        optimizer.zero_grad()
        model(x, task="a").pow(3).sum().backward()
        assert weight.grad is not None
        optimizer.step()
        moves.append(float((weight.detach() - before).norm()))
    assert moves[1] == pytest.approx(0.9 * moves[0])
    assert moves[2] == pytest.approx(0.81 * moves[0])


def test_the_groups_spare_scores_and_normalisation_from_decay() -> None:
    plan = weft.taps(linear())
    (group,) = plan.groups
    assert not group.decay
    assert group.takes("0:score")
    assert group.takes("1.weight")
    assert not group.takes("0.weight:tuned")
    assert plan.patches["0.weight"].anchored("0.weight") == ("0.weight:tuned",)


def test_phases_follow_the_options() -> None:
    names = [p.name for p in weft.taps(linear()).phases]
    assert names == ["warm-up", "select", "harden"]
    assert [p.name for p in weft.taps(linear(), warmup=0, harden=0.0).phases] == ["select"]
    warmup, select, harden = weft.taps(linear(), warmup=2, harden=0.4).phases
    assert (warmup.epochs, warmup.penalty, warmup.selectable) == (2, 0.0, False)
    assert (select.share, select.penalty, select.selectable) == (0.6, 1.0, False)
    assert (harden.share, harden.penalty, harden.selectable) == (0.4, 0.0, True)
    assert not harden.trains("0:score")
    assert harden.trains("0.weight:tuned")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"penalty": -0.1}, r"penalty=...\) is a number >= 0, found -0.1"),
        ({"penalty": float("nan")}, r"penalty=...\) is a number >= 0, found nan"),
        ({"warmup": -1}, r"warmup=...\) is a whole number of at least 0, found -1"),
        ({"warmup": 1.5}, "found 1.5"),
        ({"harden": 1.0}, r"harden=...\) is a number in \[0, 1\), found 1.0"),
        ({"form": "soft"}, "'tuned' or 'residual', found 'soft'"),
        ({"legacy_norm": 0}, r"legacy_norm=...\) is a positive number or None, found 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        weft.taps(linear(), **options)


def test_nothing_to_gate_is_refused() -> None:
    with pytest.raises(PlanError, match="taps gates convolutions and linear layers, and this base"):
        weft.taps(nn.Sequential(nn.LayerNorm(3)))


def test_weight_decay_of_a_hardened_layer_still_pulls_towards_the_base() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    model = weft.MultiTaskModel(base, weft.taps(base), example=torch.zeros(1, 3))
    model.add_task("a", weft.Classification(2))
    model.harden("a")
    state = model.tasks["a"]
    anchored = {key for name, patch in state.patches.items() for key in patch.anchored(name)}
    assert anchored == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_score_gradient_is_zero_while_tuned_and_base_are_equal_and_right_channels_last() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(32, 64, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    weights = torch.randn(32, 64, 3, 3, generator=generator)
    for shift in (0.0, 1e-3):
        tuned = nn.Parameter(base + shift * torch.randn(base.shape, generator=generator))
        score = nn.Parameter(torch.tensor(0.05))
        tensors: Mapping[str, Tensor] = {"w:tuned": tuned, "s": score}
        (GatedTuned("s").compose("w", base, tensors) * weights).sum().backward()
        difference = weights.double() * (tuned.detach().double() - base.double())
        bound = 1e-3 * float(difference.norm())
        assert abs(float(score.grad) - float(difference.sum())) <= bound
