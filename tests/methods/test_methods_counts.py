"""The papers' and the closed-form figures, on the networks that they were counted on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import pytest
import torch
import torchvision
from torch import nn

import weft
from weft.core.sites import Kind, sites

GATES = {"resnet18": 20, "resnet34": 36, "resnet50": 53, "resnet101": 104}


@lru_cache(maxsize=8)
def network(name: str) -> nn.Module:
    """A torchvision network without its classifier; tensors without memory, which counts need."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    if name.startswith("resnet"):
        net.fc = nn.Identity()
    else:
        net.classifier = nn.Identity()
    return net


def owned(net: nn.Module, names: Iterable[str]) -> int:
    """Parameters among the named tensors."""
    sizes = {n: p.numel() for n, p in net.named_parameters()}
    return sum(sizes.get(n, 0) for n in names)


@pytest.mark.parametrize(("name", "gates"), GATES.items())
def test_taps_has_one_gate_per_convolution(name: str, gates: int) -> None:
    plan = weft.taps(network(name), penalty=1.0)
    (penalty,) = plan.penalties
    assert len(penalty.scores) == len(set(penalty.scores)) == gates
    assert penalty.shares == (1 / gates,) * gates
    assert weft.taps(network(name), legacy_norm=52).penalties[0].shares == (1 / 52,) * gates


def gate_order(net: nn.Module) -> list[str]:
    """Convolutions in the order of the authors' heat map: stem, then c1, c2, c3, downsample."""
    return [s.name for s in sites(net) if s.kind is Kind.LAYER]


@pytest.mark.parametrize(
    ("opened", "parameters", "share"),
    [
        ([25, 26, 27, 40, *range(43, 50), 51, 52], 15_532_032, 0.661),
        ([44, 45, 46, 49, 52], 7_602_176, 0.323),
    ],
    ids=["CUB", "Cars"],
)
def test_taps_masks_of_the_authors_heat_map(
    opened: list[int], parameters: int, share: float
) -> None:
    net = torchvision.models.resnet50(weights=None)
    net.fc = nn.Identity()
    order = gate_order(net)
    assert len(order) == 53
    model = weft.MultiTaskModel(net, weft.taps(net))
    model.add_task("a", weft.Task(None, nn.functional.mse_loss))
    own = model.tasks["a"].own
    for i, site in enumerate(order):
        with torch.no_grad():
            own[f"{site}:score"].fill_(0.15 if i in opened else 0.05)
    for _ in range(2):
        ledger = model.ledger("a")
        rows = [r for r in ledger.rows if r.score is not None]
        assert sum(r.own for r in rows) == parameters
        assert ledger.open_gates == (len(opened), 53)
        assert ledger.own_parameters == parameters + 53_120
        assert ledger.own_buffers == 53_120 + 53
        convolutions = sum(r.size for r in rows)
        assert convolutions == 23_454_912
        assert round(parameters / ledger.base_parameters, 3) == share
        model.harden("a")  # and after it: nothing changes
    assert len(model.trainable("a")) == len(opened) + 2 * 53


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 9_600),
        ("resnet34", 17_024),
        ("resnet50", 53_120),
        ("mobilenet_v2", 34_112),
    ],
)
def test_scale_bias_counts(name: str, count: int) -> None:
    net = network(name)
    plan = weft.scale_bias(net)
    assert owned(net, plan.patches) == count
    statistics = {n for n in plan.patches if n.endswith(("running_mean", "running_var"))}
    buffers = dict(net.named_buffers())
    assert sum(buffers[n].numel() for n in statistics) == count


def test_scale_bias_of_inception() -> None:
    with torch.device("meta"):
        net = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    assert owned(net, weft.scale_bias(net).patches) == 34_432


def test_depthwise_counts() -> None:
    net = network("mobilenet_v2")
    alone = weft.depthwise_patch(net, scale_bias=False)
    assert owned(net, alone.patches) == 64_224
    assert owned(net, weft.depthwise_patch(net).patches) == 64_224 + 34_112
    assert sum(p.numel() for p in net.parameters()) == 2_223_872


@pytest.mark.parametrize(
    ("name", "total"),
    [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032)],
)
def test_full_finetune_owns_everything(name: str, total: int) -> None:
    net = network(name)
    assert owned(net, weft.full_finetune(net).patches) == total


STAGES = {
    "resnet18": (0.09, 1.41, 6.11, 24.90),
    "resnet34": (0.04, 1.09, 6.33, 38.39),
    "resnet50": (0.04, 0.96, 6.15, 36.34),
    "resnet101": (0.02, 0.53, 3.40, 64.79),
}


@pytest.mark.parametrize(
    ("name", "stage", "percent"),
    [(name, i, p) for name, row in STAGES.items() for i, p in enumerate(row)],
)
def test_hard_sharing_cuts_of_residual_networks(name: str, stage: int, percent: float) -> None:
    net = network(name)
    tops = ("conv1 bn1", "layer1", "layer2", "layer3")[: stage + 1]
    inside = tuple(f"{part}." for top in tops for part in top.split())
    expected = {n for n, _ in net.named_parameters() if n.startswith(inside)}
    fraction = owned(net, expected) / sum(p.numel() for p in net.parameters())
    assert round(100 * fraction, 2) == percent
    plan = weft.hard_sharing(net, own="bottom", fraction=fraction, batchnorm="follow")
    assert {n for n in plan.patches if n in dict(net.named_parameters())} == expected
    private = weft.hard_sharing(net, own="bottom", fraction=fraction)
    norms = set(weft.scale_bias(net).patches)
    assert set(private.patches) == set(plan.patches) | norms
    assert not private.train_shared & private.patches.keys()
    assert private.train_shared | private.patches.keys() == set(weft.full_finetune(net).patches)


MOBILENET = {0: 0.04, 1: 0.08, 3: 0.71, 6: 2.50, 10: 10.76, 13: 24.40, 16: 60.16, 17: 81.47}


@pytest.mark.parametrize(("block", "percent"), MOBILENET.items())
def test_hard_sharing_cuts_of_a_mobile_network(block: int, percent: float) -> None:
    net = network("mobilenet_v2")
    inside = tuple(f"features.{i}." for i in range(block + 1))
    expected = {n for n, _ in net.named_parameters() if n.startswith(inside)}
    fraction = owned(net, expected) / 2_223_872
    assert round(100 * fraction, 2) == percent
    plan = weft.hard_sharing(net, fraction=fraction, batchnorm="follow")
    assert {n for n in plan.patches if n in dict(net.named_parameters())} == expected


def test_hard_sharing_of_the_top_is_the_other_end() -> None:
    net = network("resnet50")
    expected = {n for n, _ in net.named_parameters() if n.startswith(("layer4.1.", "layer4.2."))}
    fraction = owned(net, expected) / sum(p.numel() for p in net.parameters())
    assert round(100 * fraction, 1) == 38.0
    plan = weft.hard_sharing(net, own="top", fraction=fraction, batchnorm="follow")
    assert {n for n in plan.patches if n in dict(net.named_parameters())} == expected
