"""The CIFAR ResNets of He et al., with parameter-free (option A) shortcuts, as feature trunks.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. The
output is the globally pooled feature vector. Inputs are scaled by ImageNet's mean and deviation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "cifar10_resnet20.safetensors"


class Shortcut(nn.Module):
    """Every second pixel, with zeros for the new channels."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.each_side = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each_side, self.each_side))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class CifarResNet(nn.Module):
    """(B, 3, 32, 32) images to (B, 64) features; 6 n + 2 layers with the linear one."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            inputs, outputs = widths[stage - 1], widths[stage]
            stages = [BasicBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*stages))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return x.mean((2, 3))


def cifar_resnet20(weights: Path) -> CifarResNet:
    """ResNet-20 with weights trained on CIFAR-10, without its classifier."""
    net = CifarResNet()
    tensors = {k: v for k, v in load_file(weights).items() if not k.startswith("linear.")}
    net.load_state_dict(tensors)
    return net.eval()


def classifier(weights: Path) -> nn.Linear:
    """The classifier of the ten classes of CIFAR-10, to check the trunk with."""
    tensors = load_file(weights)
    linear = nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.copy_(tensors["linear.weight"])
        linear.bias.copy_(tensors["linear.bias"])
    return linear
