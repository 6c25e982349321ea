"""Tiny bases that between them hold every kind of layer, and one real model of each library.

Each base says what it has, so that the tests know which methods must refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Base:
    """A base for the property tests.

    Args:
        name: shown in the tests' names.
        make: makes it anew, with the same tensors each time.
        inputs: a batch of so many rows.
        has: what methods may ask for: "norm", "batchnorm", "depthwise", "layer", "bias",
            "blocks" (residual ones).
        output: what heads read, if the base returns a structure.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    has: frozenset[str]
    output: str | None = None


def images(channels: int = 3, size: int = 8) -> Inputs:
    """Batches of shape (rows, channels, size, size)."""
    return lambda rows: torch.randn(rows, channels, size, size)


def vectors(features: int = 6) -> Inputs:
    """Batches of shape (rows, features)."""
    return lambda rows: torch.randn(rows, features)


def sequences(length: int = 5, features: int = 8) -> Inputs:
    """Batches of shape (rows, length, features)."""
    return lambda rows: torch.randn(rows, length, features)


def tokens(length: int = 5, vocabulary: int = 11) -> Inputs:
    """Batches of token ids of shape (rows, length)."""
    return lambda rows: torch.randint(0, vocabulary, (rows, length))


class Pooled(nn.Sequential):
    """A network whose output is averaged over places: (rows, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).mean(2)


class Residual(nn.Module):
    """A residual block with a downsample branch and batch normalisation."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, 2), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inside + self.downsample(x)).relu()


class TiedLanguageModel(nn.Module):
    """Embedding and output projection are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.norm(self.embed(ids)))))


class Attention(nn.Module):
    """nn.MultiheadAttention with a residual and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """A bidirectional LSTM and a GRU cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.lstm(x)[0].mean(1), x[:, 0, :5])


class Custom(nn.Module):
    """A user's module: a bare parameter, a buffer that training moves, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1 * x.mean(0))
                self.steps += 1
        x = self.first(x + self.token - self.average)
        return self.again(self.norm(torch.tanh(x)))


def _convolutions() -> nn.Module:
    return Pooled(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=2, dilation=2, padding_mode="circular", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.BatchNorm2d(12),
    )


def _transposed() -> nn.Module:
    return Pooled(
        nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.GELU(),
        nn.ConvTranspose2d(6, 6, 2, groups=3, dilation=2),
        nn.GroupNorm(2, 6),
    )


def _grouped_norm() -> nn.Module:
    return Pooled(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.GroupNorm(1, 8),
    )


def _layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 7), nn.RMSNorm(7)
    )


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        num_layers=2,
        enable_nested_tensor=False,
    )


def _timm() -> nn.Module:
    import timm

    return timm.create_model("test_efficientnet", num_classes=0)


def _timm_vit() -> nn.Module:
    import timm

    return timm.create_model("test_vit", num_classes=0, img_size=32)


def _torchvision() -> nn.Module:
    import torchvision

    net = torchvision.models.mobilenet_v2(width_mult=0.1)
    net.classifier = nn.Identity()
    return net


def _transformers() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=11, intermediate_size=20, max_position_embeddings=8, **sizes,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config)


def _text(rows: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": torch.randint(0, 11, (rows, 5)), "attention_mask": mask}


def _with(*has: str) -> frozenset[str]:
    return frozenset({"layer", "bias", *has})


TINY = (
    Base("convolutions", _convolutions, images(), _with("norm", "batchnorm", "depthwise")),
    Base("transposed", _transposed, images(), _with("norm")),
    Base("groupnorm", _grouped_norm, images(), _with("norm")),
    Base(
        "residual", lambda: Pooled(Residual(3, 6)), images(), _with("norm", "batchnorm", "blocks")
    ),
    Base("layernorm", _layer_norm, vectors(), _with("norm")),
    Base("tied", TiedLanguageModel, tokens(), _with("norm")),
    Base("attention", Attention, sequences(), _with("norm")),
    Base("encoder", _encoder, sequences(), _with("norm")),
    Base("recurrent", Recurrent, sequences(), _with()),
    Base("custom", Custom, vectors(), _with("norm", "batchnorm")),
)

REAL = (
    Base("timm", _timm, images(size=32), _with("norm", "batchnorm", "depthwise")),
    Base("timm-vit", _timm_vit, images(size=32), _with("norm", "blocks")),
    Base(
        "torchvision",
        _torchvision,
        images(size=32),
        _with("norm", "batchnorm", "depthwise", "blocks"),
    ),
    Base("transformers", _transformers, _text, _with("norm"), output="pooler_output"),
)

BASES = (*TINY, *REAL)
