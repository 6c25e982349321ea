"""LoRA in weft against PEFT: training step, forward, and loading many tasks.

Networks are ViT-S/16 and ResNet-50 of transformers with random weights, at 224 px; both sides adapt
the same layers at the same rank, over a linear head. Run with: python bench/lora.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

import weft
from timing import machine, milliseconds, paired, ratio
from weft.peft_format import save_peft

RANK = 8
CLASSES = 10
Step = Callable[[], object]


class Pooled(nn.Module):
    """A network of transformers that returns its pooled features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values).pooler_output.flatten(1)


def networks() -> dict[str, tuple[nn.Module, str, int]]:
    """By name: a network, a regular expression for the layers to adapt, and its features."""
    vit = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    vit.intermediate_size = 1536
    return {
        "ViT-S/16, query and value": (Pooled(ViTModel(vit)), r".*(query|value|q_proj|v_proj)", 384),
        "ResNet-50, convolutions": (Pooled(ResNetModel(ResNetConfig())), r".*convolution", 2048),
    }


def with_weft(base: nn.Module, target: str) -> weft.MultiTaskModel:
    """A model of one task."""
    plan = weft.lora(base, r=RANK, alpha=RANK, target=target)
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, 224, 224))
    model.add_task("t", weft.Classification(CLASSES))
    return model


def with_peft(base: nn.Module, target: str, features: int) -> tuple[PeftModel, nn.Linear]:
    """The same in PEFT; running statistics are left alone, as in weft."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target)
    return get_peft_model(copy.deepcopy(base), config), nn.Linear(features, CLASSES)


def steps(base: nn.Module, target: str, features: int, batch: int) -> dict[str, Step]:
    """A training step and a forward of both."""
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))
    ours = with_weft(base, target)
    theirs, head = with_peft(base, target, features)
    ours.train()
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    own = list(ours.task_parameters("t"))
    other = [*(p for p in theirs.parameters() if p.requires_grad), *head.parameters()]
    count = [sum(p.numel() for p in group) for group in (own, other)]
    if count[0] != count[1]:
        raise SystemExit(f"Both sides must train the same; found {count[0]} and {count[1]}.")

    def step(parameters: list[nn.Parameter], forward: Callable[[], Tensor]) -> Step:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(), y).backward()
            optimizer.step()

        return run

    def ours_forward() -> Tensor:
        return ours(x, task="t")

    def theirs_forward() -> Tensor:
        return head(theirs(x))

    def without_gradients(forward: Callable[[], Tensor]) -> Step:
        def run() -> None:
            with torch.inference_mode():
                forward()

        return run

    return {
        "weft, step": step(own, ours_forward),
        "PEFT, step": step(other, theirs_forward),
        "weft, forward": without_gradients(ours_forward),
        "PEFT, forward": without_gradients(theirs_forward),
    }


def loading(base: nn.Module, target: str, tasks: int) -> None:
    """Seconds to load many tasks into a fresh model, from a bank and from folders of PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        bank = weft.Bank(Path(folder) / "bank")
        plan = weft.lora(base, r=RANK, alpha=RANK, target=target)
        model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 3, 224, 224))
        names = [f"task{i}" for i in range(tasks)]
        for name in names:
            model.add_task(name, weft.Classification(CLASSES))
            bank.save(model, name)
            save_peft(model, name, Path(folder) / "peft" / name)
            model.remove_task(name)
        start = time.perf_counter()
        loaded = bank.load(base, *names)
        ours = time.perf_counter() - start
        copied = copy.deepcopy(base)
        start = time.perf_counter()
        other = PeftModel.from_pretrained(
            copied, str(Path(folder) / "peft" / names[0]), adapter_name=names[0]
        )
        for name in names[1:]:
            other.load_adapter(str(Path(folder) / "peft" / name), adapter_name=name)
        theirs = time.perf_counter() - start
        assert len(loaded.task_names) == len(other.peft_config) == tasks
    print(f"load {tasks} tasks: weft {ours:.2f} s, PEFT {theirs:.2f} s")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=50)
    given = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    for name, (base, target, features) in networks().items():
        contestants = steps(base, target, features, given.batch)
        for what in ("step", "forward"):
            pair = {side: contestants[f"{side}, {what}"] for side in ("weft", "PEFT")}
            seconds = paired(pair, given.rounds)
            print(
                f"{name}, {what}, batch {given.batch}: {ratio(seconds, 'weft', 'PEFT')} of PEFT, "
                f"{milliseconds(seconds['PEFT'])}"
            )
        loading(base, target, given.tasks)


if __name__ == "__main__":
    main()
