"""The training step of TAPS against full fine-tuning of the plain network (ResNet-34, 96 px).

Plain: the network itself with a head, no weft. Naive TAPS: W + gate * D summed for every layer.
Run with: python bench/train_step.py
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from resnet import ResNet34
from timing import machine, milliseconds, paired, ratio


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: object, score: Tensor) -> Tensor:
        return (score >= 0.1).to(score.dtype)

    @staticmethod
    def backward(_: object, grad: Tensor) -> Tensor:
        return grad


class NaiveConv(nn.Module):
    """A convolution with W + g(s) D, as the formula is written."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight.detach())
        self.delta = nn.Parameter(torch.zeros_like(conv.weight))
        self.score = nn.Parameter(torch.tensor(0.15))
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + _StraightThrough.apply(self.score) * self.delta
        return F.conv2d(x, weight, None, self.stride, self.padding)


def naive(base: nn.Module) -> nn.Module:
    """A copy of the base with every convolution replaced."""
    copied = copy.deepcopy(base)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, NaiveConv(child))
    return copied


def main() -> None:
    """Print ratios for batches of 8 and 32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(machine(), device)
    torch.manual_seed(0)
    for batch in (8, 32):
        base = ResNet34().to(device)
        x = torch.randn(batch, 3, 96, 96, device=device)
        y = torch.randint(0, 10, (batch,), device=device)
        plain = nn.Sequential(copy.deepcopy(base), nn.Linear(512, 10)).to(device)
        formula = nn.Sequential(naive(base), nn.Linear(512, 10)).to(device)
        steps = {}
        for name, module in {"plain": plain, "naive": formula}.items():
            module.train()
            steps[name] = _plain_step(module, x, y, device)
        model = weft.MultiTaskModel(base, weft.taps(base, penalty=0.3), example=x[:1])
        model.add_task("t", weft.Classification(10))
        model.train()
        steps["taps"] = _weft_step(model, x, y, device)
        whole = weft.MultiTaskModel(base, weft.full_finetune(base), example=x[:1])
        whole.add_task("t", weft.Classification(10))
        whole.train()
        steps["full_finetune in weft"] = _weft_step(whole, x, y, device)
        for name in ("taps", "full_finetune in weft", "naive"):
            # Two at a time: a third network would push the others' weights out of the caches.
            seconds = paired({n: steps[n] for n in ("plain", name)}, arguments.rounds)
            print(
                f"batch {batch}, {name}: {ratio(seconds, name, 'plain')} of plain fine-tuning, "
                f"{milliseconds(seconds['plain'])}"
            )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _plain_step(module: nn.Module, x: Tensor, y: Tensor, device: torch.device):
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        _synchronise(device)

    return step


def _weft_step(model: weft.MultiTaskModel, x: Tensor, y: Tensor, device: torch.device):
    optimizer = torch.optim.SGD(model.task_parameters("t"), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(model(x, task="t"), y) + model.penalty("t")).backward()
        optimizer.step()
        _synchronise(device)

    return step


if __name__ == "__main__":
    main()
