"""Hard sharing, model patches and the baselines: options, order, refusals, the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from methods import residual_nets
from weft.core.sites import sites
from weft.errors import ConfigError, PlanError
from weft.registry import METHODS, Law, options_of


def net() -> nn.Sequential:
    """Three layers, each with a normalisation after it."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8),
    )  # fmt: skip


def test_linear_probe_owns_nothing() -> None:
    plan = weft.linear_probe(net())
    assert not plan.patches
    assert not plan.train_shared
    assert plan.only_owns


def test_bias_only_owns_every_bias() -> None:
    plan = weft.bias_only(net())
    assert set(plan.patches) == {"0.bias", "1.bias", "3.bias", "4.bias", "6.bias", "7.bias"}
    more = weft.bias_only(net(), statistics=True)
    assert set(more.patches) - set(plan.patches) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    with pytest.raises(PlanError, match="bias_only needs biases, and this base has none"):
        weft.bias_only(nn.Linear(2, 2, bias=False))


def test_scale_bias_owns_every_normalisation() -> None:
    owned = set(weft.scale_bias(net()).patches)
    assert {n.split(".")[0] for n in owned} == {"1", "4", "7"}
    assert {"1.weight", "1.running_var", "4.bias", "7.weight"} <= owned


def test_depthwise_patch_owns_the_spatial_kernels() -> None:
    assert set(weft.depthwise_patch(net(), scale_bias=False).patches) == {"3.weight", "3.bias"}
    assert {"3.weight", "1.weight"} <= set(weft.depthwise_patch(net()).patches)


def test_full_finetune_owns_parameters_and_statistics() -> None:
    base = net()
    assert set(weft.full_finetune(base).patches) == set(base.state_dict())


@pytest.mark.parametrize("own", ["bottom", "top"])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.999])
def test_hard_sharing_owns_one_end_and_trains_the_other(own: str, fraction: float) -> None:
    base = net()
    plan = weft.hard_sharing(base, own=own, fraction=fraction, batchnorm="follow")
    layers = {n.split(".")[0] for n in plan.patches}
    order = ["0", "1", "3", "4", "6", "7"] if own == "bottom" else ["6", "7", "3", "4", "0", "1"]
    assert layers == set(order[: len(layers)])
    assert 2 <= len(layers) <= 4  # at least one layer with its normalisation, and not all
    assert plan.patches.keys() | plan.train_shared == set(base.state_dict())
    assert not plan.patches.keys() & plan.train_shared
    assert plan.trains_shared


def test_hard_sharing_trains_the_common_part_with_every_task() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model = weft.MultiTaskModel(base, weft.hard_sharing(base, own="bottom", fraction=0.4))
    for name in "ab":
        model.add_task(name, weft.Task(None, nn.functional.mse_loss))
    x = {t: torch.randn(2, 3) for t in "ab"}
    weight = model.shared_trainable()["1.weight"]
    both = torch.autograd.grad(sum(o.sum() for o in model.step(x).outputs.values()), weight)[0]
    apart: list[Tensor] = [
        torch.autograd.grad(model.step({t: x[t]}).outputs[t].sum(), weight)[0] for t in "ab"
    ]
    assert torch.allclose(both, sum(apart))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"own": "middle"}, "'bottom', 'top', 'nothing' or a list of patterns .* found 'middle'"),
        ({"fraction": 0.0}, r"fraction=...\) is a number in \(0, 1\), found 0.0"),
        ({"fraction": 1.0}, r"number in \(0, 1\), found 1.0"),
        ({"batchnorm": "shared"}, "'private' or 'follow', found 'shared'"),
        ({"own": ["0", "2"]}, "'2' matches 2, with no tensors to own"),
    ],
)
def test_wrong_options_of_hard_sharing_are_refused(
    options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        weft.hard_sharing(net(), **options)


def test_hard_sharing_needs_two_layers() -> None:
    with pytest.raises(PlanError, match="at least two layers"):
        weft.hard_sharing(nn.Linear(2, 2))


# ---------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", list(METHODS))
def test_registered_methods_name_themselves_and_keep_their_options(name: str) -> None:
    base, given = net(), {}
    if "example" in options_of(name):
        base, given = residual_nets.net(), {"example": residual_nets.images(2)}
    plan = weft.method(name, base, **given)
    assert plan.method == name
    assert weft.method(name, base, **given, **plan.options).options == plan.options
    assert name in weft.__all__
    assert METHODS[name].plan is getattr(weft, name)
    assert METHODS[name].summary
    assert all(isinstance(law, Law) and reason for law, reason in METHODS[name].exceptions.items())
    known = {n for s in sites(base) for n in s.parameters + s.statistics}
    assert plan.patches.keys() | plan.train_shared <= known
    documentation = METHODS[name].plan.__doc__
    assert documentation is not None
    assert "Returns:" in documentation


def test_unknown_methods_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no method 'tap'. Methods: .*Close matches: taps"):
        weft.method("tap", net())
    with pytest.raises(ConfigError, match=r"'taps' has no option 'penality'.*Close matches: pen"):
        weft.method("taps", net(), penality=1.0)
    with pytest.raises(ConfigError, match=r"'linear_probe' has no option 'x'. Options: none"):
        weft.method("linear_probe", net(), x=1)


def test_hard_sharing_owns_what_is_named() -> None:
    base = net()
    plan = weft.hard_sharing(base, own=["3", "6"], batchnorm="follow")
    assert set(plan.patches) == {"3.weight", "3.bias", "6.weight", "6.bias"}
    assert plan.train_shared == set(base.state_dict()) - plan.patches.keys()
    nested = nn.Sequential(net(), nn.Linear(8, 2))
    inside = weft.hard_sharing(nested, own=["0"], batchnorm="follow")
    assert set(inside.patches) == {f"0.{name}" for name in base.state_dict()}
    assert weft.hard_sharing(nested, own=["0.?"]).patches.keys() == inside.patches.keys()
    with pytest.raises(PlanError, match="no module is called '8'"):
        weft.hard_sharing(base, own=["3", "8"])
    with pytest.raises(PlanError, match=r"own=\['3'\]"):
        weft.hard_sharing(base, own="3")  # type: ignore[arg-type]


def test_hard_sharing_may_own_nothing_but_the_head() -> None:
    plan = weft.hard_sharing(net(), own="nothing", batchnorm="follow")
    assert not plan.patches
    assert plan.train_shared == set(net().state_dict())
    private = weft.hard_sharing(net(), own="nothing")
    assert {n.split(".")[0] for n in private.patches} == {"1"}  # statistics make it private
