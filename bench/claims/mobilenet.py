"""MobileNetV2 at width 0.35 as a feature trunk, with the Keras ImageNet weights.

Modules and state-dict keys follow torchvision's ``MobileNetV2(width_mult=0.35).features``; the
arithmetic follows Keras: BatchNorm eps 1e-3, TensorFlow "same" padding at stride 2, and inputs
scaled to RGB / 127.5 - 1. The output is the globally pooled feature vector, so a linear head goes
straight on top. ``decode`` reads the JPEG-packed data sets the claims are measured on.
"""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "mobilenet_v2_035_224_notop_imagenet.safetensors"
FEATURES = 1280
CONVOLUTIONS, CONVOLUTION_PARAMETERS, AFFINE_PARAMETERS = 52, 382_048, 14_080

WIDTH = 0.35
# expansion, channels at width 1, blocks, stride of the first block (table 2 of the paper)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _channels(width_one: int) -> int:
    """Channels at our width: a multiple of 8, never more than 10 % below the exact product."""
    exact = width_one * WIDTH
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class SameConv2d(nn.Conv2d):
    """Stride-2 3x3 convolution with TensorFlow's "same" padding.

    An even side is padded by 1 at its far end only (right, bottom); an odd side at both ends.
    """

    def __init__(self, inputs: int, outputs: int, *, groups: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    if stride == 2:
        return SameConv2d(inputs, outputs, groups=groups)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _unit(
    inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = _convolution(inputs, outputs, kernel, stride=stride, groups=groups)
    return nn.Sequential(convolution, _norm(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_unit(inputs, hidden)] if expansion != 1 else []),
            _unit(hidden, hidden, 3, stride=stride, groups=hidden),
            _convolution(hidden, outputs),
            _norm(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """(B, 3, H, W) images, scaled by ``normalise``, to (B, 1280) features."""

    def __init__(self) -> None:
        super().__init__()
        inputs = _channels(32)
        layers: list[nn.Module] = [_unit(3, inputs, 3, stride=2)]
        for expansion, width_one, blocks, first_stride in STAGES:
            outputs = _channels(width_one)
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, stride=stride, expansion=expansion))
                inputs = outputs
        layers.append(_unit(inputs, FEATURES))  # widths below 1 leave the last layer at 1280
        self.features = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def mobilenet_v2_035(weights: Path | str | None) -> nn.Module:
    """The trunk, with the weights of a safetensors file, or at random for ``None``."""
    network = MobileNetV2()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    total = sum(p.numel() for p in network.parameters())
    assert len(convolutions) == CONVOLUTIONS
    assert sum(m.weight.numel() for m in convolutions) == CONVOLUTION_PARAMETERS
    assert total == CONVOLUTION_PARAMETERS + AFFINE_PARAMETERS
    if weights is not None:
        _load(network, Path(weights))
    return network


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path} (expected the file {WEIGHTS_FILE})")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    wanted = network.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit MobileNetV2 width {WIDTH}: {'; '.join(problems[:5])}{more}"
        )
    network.load_state_dict(found, strict=True)


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB to the float range the weights were trained on, [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def decode(npz_path: Path | str, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """One split of a JPEG-packed set: uint8 images (N, 3, H, W), int64 labels, class names."""
    with np.load(npz_path) as packed:
        if f"jpg_{split}" not in packed:
            splits = sorted(key[4:] for key in packed.files if key.startswith("jpg_"))
            raise KeyError(f"{npz_path} has no JPEG split {split!r}; it has {splits}")
        data, offsets = packed[f"jpg_{split}"], packed[f"off_{split}"].tolist()
        labels = torch.from_numpy(packed[f"y_{split}"].astype(np.int64))
        classes = [str(name) for name in packed["classes"]]
    images = np.stack(
        [
            np.asarray(Image.open(BytesIO(data[start:end].tobytes())).convert("RGB"))
            for start, end in pairwise(offsets)
        ]
    )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, classes
