"""Residual blocks are found by what they do, on networks of all kinds, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.residual_nets import BLOCKS, SHORTCUTS, images, net, same, snapshot
from weft.core.blocks import ResidualBlock, residual_blocks
from weft.errors import PlanError

IMAGE = torch.randn(1, 3, 32, 32)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], num_classes=3)


def swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3)


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0, **options)


def shortcuts(base: nn.Module, x: Any = IMAGE) -> dict[str, str]:
    return {site: block.shortcut for site, block in residual_blocks(base, x).items()}


def stages(*depths: int, first: bool) -> dict[str, str]:
    """The blocks of a ResNet, with a projection at the start of stages (the first one or not)."""
    return {
        f"layer{i + 1}.{j}": "downsample" if j == 0 and (i or first) else ""
        for i, depth in enumerate(depths)
        for j in range(depth)
    }


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "resnet18": (partial(torchvision_model, "resnet18"), stages(2, 2, 2, 2, first=False)),
    "resnet50": (partial(torchvision_model, "resnet50"), stages(3, 4, 6, 3, first=True)),
    "zero-initialised": (
        partial(torchvision_model, "resnet18", zero_init_residual=True),
        stages(2, 2, 2, 2, first=False),
    ),
    "timm resnet": (partial(timm_model, "resnet18"), stages(2, 2, 2, 2, first=False)),
    "mobilenet_v2": (
        partial(torchvision_model, "mobilenet_v2", width_mult=0.25),
        {f"features.{i}": "" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)},
    ),
    "convnext": (convnext, {"features.1.0": "", "features.1.1": "", "features.3.0": ""}),
    "swin": (
        swin,
        {"features.1.0": "", "features.1.1": "", "features.3.0": "", "features.3.1": ""},
    ),
    "vit_tiny": (
        partial(timm_model, "vit_tiny_patch16_224", img_size=32, depth=2),
        {"blocks.0": "", "blocks.1": ""},
    ),
    "hand-made": (net, SHORTCUTS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_known_networks(name: str) -> None:
    make, expected = NETWORKS[name]
    found = shortcuts(make())
    # mobilenet's first widths are equal at a quarter of the channels
    assert {k: v for k, v in found.items() if k in expected} == expected
    assert found.keys() - expected.keys() <= {"features.1"}
    assert list(found) == list(dict.fromkeys(found))


def test_channels_and_their_place() -> None:
    assert residual_blocks(net(), images(2)) == {
        "blocks.0": ResidualBlock("", 4, 1),
        "blocks.1": ResidualBlock("down", 4, 1),
        "blocks.2": ResidualBlock("", 6, 1),
        "blocks.3": ResidualBlock("", 6, 1),
    }
    places = {
        "swin": (swin, [(8, -1)] * 2 + [(16, -1)] * 2),
        "convnext": (convnext, [(8, 1)] * 2 + [(12, 1)]),
        "vit": (partial(timm_model, "test_vit", img_size=32), [(64, -1)] * 6),
    }
    for make, expected in places.values():
        found = residual_blocks(make(), IMAGE if make is not swin else torch.randn(1, 3, 48, 48))
        assert [(b.channels, b.channel_dim) for b in found.values()] == expected
    line = nn.Sequential(Adds(nn.Conv1d(4, 4, 3, padding=1)), nn.Flatten())
    assert residual_blocks(line, torch.randn(2, 4, 9))["0"].channel_dim == 1
    tokens = nn.Sequential(Adds(nn.Linear(4, 4)), nn.Flatten())
    assert residual_blocks(tokens, torch.randn(2, 9, 4))["0"].channel_dim == -1
    assert residual_blocks(tokens, torch.randn(2, 4))["0"].channel_dim == -1


def test_finding_leaves_the_base_alone() -> None:
    base, x = net().train(), images()
    before, state = snapshot(base), torch.get_rng_state()
    residual_blocks(base, x)
    assert same(before, snapshot(base))
    assert base.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(state, torch.get_rng_state())


class Adds(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.inner(x))


class Padded(nn.Module):
    """A shortcut without parameters: every second place, with channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = Padded()
        self.conv = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.conv(x))


class Positions(nn.Module):
    """Adds a constant: no block, though at zero it gives its input."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Adds(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.relu_())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.linear(x), None


class Parent(nn.Module):
    """Calls its block in a way of its own."""

    def __init__(self, block: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x)


def mlp(last: nn.Module | None = None) -> Adds:
    return Adds(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), last)


def test_hand_made_blocks() -> None:
    x = torch.randn(2, 4)
    assert shortcuts(nn.Sequential(mlp(), mlp(nn.ReLU())), x) == {"0": "", "1": ""}
    nested = nn.Sequential(nn.Sequential(mlp(), mlp()), nn.Linear(4, 3))
    assert shortcuts(nested, x) == {"0.0": "", "0.1": ""}  # the innermost ones
    strided = nn.Sequential(Strided(), nn.Flatten())
    assert shortcuts(strided, torch.randn(2, 4, 6, 6)) == {"0": "shortcut"}
    assert shortcuts(net().double(), images(2)) == SHORTCUTS  # the example follows the base


def test_what_is_no_block_is_not_found() -> None:
    x = torch.randn(2, 4)
    plain = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Positions(), nn.Sequential(nn.Linear(4, 4))
    )
    assert shortcuts(plain, x) == {}
    assert shortcuts(nn.Sequential(mlp(nn.LayerNorm(4))), x) == {}
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    assert shortcuts(nn.Sequential(encoder), torch.randn(2, 3, 4)) == {}
    pre = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    assert shortcuts(nn.Sequential(pre), torch.randn(2, 3, 4)) == {"0": ""}


X = torch.randn(2, 4)
REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "post-norm": (nn.Sequential(mlp(nn.LayerNorm(4))), "0", r"normalises the sum \(post-norm\)"),
    "a layer": (nn.Sequential(nn.Linear(4, 4)), "0", "gives neither its input"),
    "used twice": (Twice(), "block", "it is called 2 times in one forward"),
    "in place": (nn.Sequential(InPlace()), "0", "gives neither its input"),
    "a pair": (Parent(Pair(), lambda b, x: b(x)[0]), "block", "its output is a tuple"),
    "keyword": (Parent(mlp(), lambda b, x: b(x=x)), "block", "no tensor in the first place"),
    "unused": (Parent(mlp(), lambda _, x: x), "block", "does not call it on the example"),
    "integers": (
        Parent(nn.Embedding(4, 4), lambda b, x: b(x.argmax(1))),
        "block",
        "no tensor of features",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_named_modules_that_are_no_blocks_are_refused_with_the_reason(name: str) -> None:
    base, site, reason = REFUSED[name]
    with pytest.raises(PlanError, match=f"'{site}' is no residual block: .*{reason}"):
        residual_blocks(base, X, [site])
    assert residual_blocks(base, X) == {}


def test_named_blocks_are_checked_and_ordered() -> None:
    base = net()
    assert list(residual_blocks(base, images(), ["blocks.3", "blocks.1"])) == [
        "blocks.1",
        "blocks.3",
    ]
    assert list(residual_blocks(base, images(), dict(reversed(SHORTCUTS.items())))) == list(BLOCKS)
    with pytest.raises(PlanError, match=r"shortcut of block 'blocks.1' is 'down', not ''"):
        residual_blocks(base, images(), {"blocks.1": ""})
    with pytest.raises(PlanError, match=r"'blocks.7' is not in the base.*blocks.3"):
        residual_blocks(base, images(), ["blocks.7"])
    outer = nn.Sequential(nn.Sequential(mlp(), mlp()), nn.Linear(4, 3))
    assert list(residual_blocks(outer, X, ["0"])) == ["0"]
    with pytest.raises(PlanError, match="'0' has another block inside"):
        residual_blocks(outer, X, ["0", "0.1"])


def test_blocks_that_cannot_be_divided_by_rows_say_why() -> None:
    masked = Parent(mlp(), lambda b, x: b(x))
    assert residual_blocks(masked, X)["block"].indivisible == ""
    turned = Parent(mlp(), lambda b, x: b(x.transpose(0, 1)).transpose(0, 1))
    found = residual_blocks(turned, torch.randn(2, 3, 4))
    assert "rows of the batch first" in found["block"].indivisible

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + self.linear(x * mask)

    given = Parent(Masked(), lambda b, x: b(x, mask=torch.ones_like(x)))
    assert "other tensors" in residual_blocks(given, X)["block"].indivisible
