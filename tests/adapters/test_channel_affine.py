"""ChannelAffine: y = scale * layer(x) + shift per output channel, against hooks on the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weft
from weft.adapters import INSERTIONS, ChannelAffine
from weft.bank.plans import decode_plan, encode_plan
from weft.errors import PlanError

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)


def image(*shape: int) -> Tensor:
    return torch.randn(3, *shape)


# By name: a layer with 6 output channels, an input, and the axis of the channels in the output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(4, 6), image(4), 1),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), image(4), 1),
    "linear on sequences": (lambda: nn.Linear(4, 6), image(5, 4), 2),
    "linear on maps": (lambda: nn.Linear(4, 6), image(2, 5, 4), 3),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), image(4, 9), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), image(4, 5, 5), 1),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), image(2, 3, 3, 3), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), image(4, 5, 5), 1),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), image(6, 5, 5), 1),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), image(4, 5, 5), 1),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), image(4, 5), 1),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), image(4, 5, 5), 1),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), image(4, 3, 3), 1),
    "batchnorm without affine": (lambda: nn.BatchNorm2d(6, affine=False), image(6, 5, 5), 1),
    "instancenorm without affine": (
        lambda: nn.InstanceNorm1d(6, track_running_stats=True),
        image(6, 5),
        1,
    ),
}  # fmt: skip
layers = pytest.mark.parametrize("layer", LAYERS)


def with_one_task(base: nn.Module, *sites: str) -> weft.MultiTaskModel:
    """A model with a task whose scales and shifts are no longer the identity."""
    plan = weft.Sharing("affine", adapters={site: ChannelAffine() for site in sites})
    model = weft.MultiTaskModel(base, plan).eval()
    model.add_task("a", PASS)
    for tensor in model.trainable("a").values():
        nn.init.normal_(tensor)
    return model


def hooked(base: nn.Module, model: weft.MultiTaskModel, axes: dict[str, int]) -> nn.Module:
    """The oracle: a copy of the base whose layers' outputs are scaled and shifted by hooks."""
    plain, own = copy.deepcopy(base), model.tasks["a"].own
    for site, axis in axes.items():

        def affine(_m: nn.Module, _x: Any, y: Tensor, site: str = site, axis: int = axis) -> Tensor:
            moved = y.movedim(axis, -1) * own[f"{site}:scale"] + own[f"{site}:shift"]
            return moved.movedim(-1, axis)

        plain.get_submodule(site).register_forward_hook(affine)
    return plain


@layers
def test_a_new_affine_is_the_identity_bit_for_bit(layer: str) -> None:
    make, x, _ = LAYERS[layer]
    base = nn.Sequential(make()).eval()
    model = weft.MultiTaskModel(base, weft.Sharing("affine", adapters={"0": ChannelAffine()}))
    model.add_task("a", PASS)
    assert torch.equal(model.eval()(x, task="a"), base(x))
    assert {k: tuple(t.shape) for k, t in model.trainable("a").items()} == {
        "0:scale": (6,),
        "0:shift": (6,),
    }


@layers
def test_each_channel_is_scaled_and_shifted_by_its_own_numbers(layer: str) -> None:
    make, x, axis = LAYERS[layer]
    base = nn.Sequential(make()).eval()
    model = with_one_task(base, "0")
    expected = hooked(base, model, {"0": axis})(x)
    assert torch.allclose(model(x, task="a"), expected, atol=1e-6)
    assert not torch.allclose(expected, base(x), atol=1e-2)


@layers
def test_folding_into_the_layer_is_exact(layer: str) -> None:
    make, x, _ = LAYERS[layer]
    base = nn.Sequential(make()).double().eval()
    before = copy.deepcopy(base.state_dict())
    model = with_one_task(base, "0")
    folded = model.fold("a")
    assert type(folded[0]) is type(base[0])
    assert torch.allclose(folded(x.double()), model(x.double(), task="a"), atol=1e-12)
    assert all(torch.equal(before[k], t) for k, t in base.state_dict().items())


def test_channels_last_stays_channels_last() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    x = image(4, 5, 6).to(memory_format=torch.channels_last)
    model = with_one_task(base, "0")
    y = model(x, task="a")
    assert base(x).is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, hooked(base, model, {"0": 1})(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_layer_is_kept(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(4, 6)).to(dtype)
    model = with_one_task(base, "0")
    assert model.trainable("a")["0:scale"].dtype is dtype
    assert model(torch.randn(2, 4, dtype=dtype), task="a").dtype is dtype


def test_autocast_keeps_its_type_behind_the_affine() -> None:
    model = with_one_task(nn.Sequential(nn.Linear(4, 6)), "0")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4), task="a").dtype is torch.bfloat16


def test_gradients_are_those_of_the_formula() -> None:
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1))
    model = with_one_task(base, "0")
    x, weight = image(3, 4, 4), image(6, 4, 4)
    (model(x, task="a") * weight).sum().backward()
    own = model.trainable("a")
    assert torch.allclose(own["0:shift"].grad, weight.sum((0, 2, 3)), atol=1e-5)
    assert torch.allclose(own["0:scale"].grad, (weight * base(x)).sum((0, 2, 3)), atol=1e-4)


def test_a_layer_used_twice_is_scaled_both_times() -> None:
    layer = nn.Linear(4, 4)
    base = nn.Sequential(layer, nn.Tanh(), layer)
    model = with_one_task(base, "0")
    x = image(4)
    scale, shift = model.trainable("a")["0:scale"], model.trainable("a")["0:shift"]
    once = layer(x) * scale + shift
    assert torch.allclose(model(x, task="a"), layer(once.tanh()) * scale + shift, atol=1e-6)
    assert torch.allclose(model.fold("a")(x), model(x, task="a"), atol=1e-5)


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight: no scale of the weight survives."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        return self._conv_forward(x, weight / weight.std(), self.bias)


@pytest.mark.parametrize(
    "make",
    [lambda: Standardised(3, 6, 3), lambda: parametrizations.weight_norm(nn.Conv2d(3, 6, 3))],
    ids=["a class of one's own", "weight norm"],
)
def test_a_layer_that_changes_its_weight_runs_and_does_not_fold(
    make: Callable[[], nn.Module],
) -> None:
    base = nn.Sequential(make())
    model = with_one_task(base, "0")
    x = image(3, 5, 5)
    assert torch.allclose(model(x, task="a"), hooked(base, model, {"0": 1})(x), atol=1e-5)
    with pytest.raises(PlanError, match=r"do not fold into \w+, which is no layer of"):
        model.fold("a")


@pytest.mark.parametrize("layer", [nn.LSTM(4, 6), nn.Bilinear(4, 4, 6), nn.Embedding(4, 6)])
def test_other_layers_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"output channels of {type(layer).__name__} are not known"):
        with_one_task(nn.Sequential(layer), "0")


def test_a_plan_with_affines_comes_back_from_plain_values() -> None:
    plan = weft.Sharing("affine", adapters={"0": ChannelAffine(), "2": ChannelAffine()})
    assert INSERTIONS["channel_affine"] is ChannelAffine
    again = decode_plan(encode_plan(plan), {})
    assert dict(again.adapters) == dict(plan.adapters)
