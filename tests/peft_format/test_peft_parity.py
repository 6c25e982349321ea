"""LoRA here and in PEFT: the same outputs, merged weights, gradients and steps of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.peft_format import load_peft

peft = pytest.importorskip("peft", reason="PEFT is not installed")

TASK = weft.Task(head=None, loss=nn.functional.mse_loss)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5, bias=False))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, (1, 3), bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 2))


def signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 6, 5, padding="same"), nn.Tanh(), nn.Conv1d(6, 3, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6, padding_idx=1), nn.Tanh(), nn.Linear(6, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (linear, torch.randn(7, 4, 6)),
    "convolutions": (convolutions, torch.randn(7, 3, 9, 9)),
    "volumes": (volumes, torch.randn(3, 2, 4, 4, 4)),
    "signals": (signals, torch.randn(5, 2, 9)),
    "tokens": (tokens, torch.randint(0, 9, (4, 6))),
}
nets = pytest.mark.parametrize("net", NETS)


def both(net: str, folder: Path) -> tuple[nn.Module, weft.MultiTaskModel, Tensor]:
    """A net adapted by PEFT, the same by us, and a batch."""
    make, x = NETS[net]
    base = make()
    targets = [n for n, m in base.named_modules() if list(m.parameters(recurse=False))]
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    load_peft(model, "a", folder, TASK)
    return theirs, model, x


def trained(theirs: nn.Module) -> dict[str, Tensor]:
    """What PEFT trains, by our keys."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            site, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{site}:{'A' if 'A' in factor else 'B'}"] = parameter
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * max(scale, 1.0)


@nets
def test_outputs_and_merged_weights_are_pefts(net: str, tmp_path: Path) -> None:
    theirs, model, x = both(net, tmp_path)
    theirs.eval(), model.eval()
    with torch.no_grad():
        assert_close(model(x, task="a"), theirs(x))
        merged = theirs.merge_and_unload().state_dict()
        folded = model.fold("a").state_dict()
    assert merged.keys() == folded.keys()
    for name, tensor in merged.items():
        assert_close(folded[name], tensor)


@nets
def test_gradients_are_pefts(net: str, tmp_path: Path) -> None:
    theirs, model, x = both(net, tmp_path)
    theirs.train(), model.train()
    theirs(x).sin().sum().backward()
    model(x, task="a").sin().sum().backward()
    expected = trained(theirs)
    found = model.trainable("a")
    assert found.keys() == expected.keys()
    for key, parameter in found.items():
        assert_close(parameter.grad, expected[key].grad)


@nets
def test_training_goes_the_same_way(net: str, tmp_path: Path) -> None:
    theirs, model, x = both(net, tmp_path)
    theirs.train(), model.train()
    pairs = [(theirs, list(trained(theirs).values())), (model, model.task_parameters("a"))]
    optimizers = [torch.optim.SGD(parameters, lr=0.05, momentum=0.9) for _, parameters in pairs]
    for _ in range(5):
        losses = (theirs(x).square().mean(), model(x, task="a").square().mean())
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, parameter in model.trainable("a").items():
        assert_close(parameter.detach(), trained(theirs)[key].detach())
