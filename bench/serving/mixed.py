"""A batch that mixes tasks against one plain forward of the base, each pair in turn in one process.

ResNet-34 without classifier, 32 rows, tasks spread over the rows at random. Beside weft: the tasks
one after another, and PEFT's LoRA with ``adapter_names`` on the same network. At the end, how many
operations are dispatched for 128 rows of 2 to 128 tasks.

Run with: python bench/serving/mixed.py [--rounds 9] [--side 224] [--tasks 8 32] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import weft
from resnet import ResNet34
from timing import machine, milliseconds, paired, ratio

ROWS, CLASSES = 32, 10

Plan = Callable[[nn.Module], weft.Sharing]

PLANS: dict[str, Plan] = {
    "scale_bias": weft.scale_bias,
    "TAPS, 30 %": lambda base: weft.taps(base, penalty=0.3),
    "hard sharing, top 30 %": lambda base: weft.hard_sharing(base, own="top", fraction=0.3),
    "hard sharing, bottom 30 %": lambda base: weft.hard_sharing(base, own="bottom", fraction=0.3),
    "everything": weft.full_finetune,
}


def make_model(base: nn.Module, plan: Plan, tasks: int) -> weft.MultiTaskModel:
    """Tasks that look as if they had been trained; of TAPS each owns at most 30 % of the layers."""
    generator = torch.Generator().manual_seed(0)
    model = weft.MultiTaskModel(base, plan(base), example=torch.zeros(2, 3, 32, 32))
    for number in range(tasks):
        name = f"task {number}"
        model.add_task(name, weft.Classification(CLASSES))
        own = model.tasks[name].own
        scores = [key for key, tensor in own.items() if tensor.dim() == 0 and key.endswith("score")]
        with torch.no_grad():
            for key, tensor in own.items():
                if tensor.dim() and tensor.is_floating_point() and "running" not in key:
                    tensor += 0.01 * torch.randn(tensor.shape, generator=generator) * tensor.std()
            left = 0.3 * sum(p.numel() for p in base.parameters())
            for place in torch.randperm(len(scores), generator=generator).tolist():
                size = own[scores[place].replace(":score", ".weight:tuned")].numel()
                opened = size <= left
                left -= size if opened else 0
                own[scores[place]].fill_(0.2 if opened else 0.0)
        if scores:
            model.harden(name)
    return model.eval()


def peft_model(base: nn.Module, tasks: int) -> Any:
    """LoRA of rank 8 on every convolution, an adapter for each task."""
    from peft import LoraConfig, get_peft_model

    names = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    config = LoraConfig(r=8, target_modules=names, init_lora_weights=False)
    model: Any = get_peft_model(base, config, adapter_name="task0")
    for number in range(1, tasks):
        model.add_adapter(f"task{number}", config)
    return model.eval()


class Count(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(base: nn.Module) -> None:
    """Print how many operations a mixed batch of 128 small images takes."""
    x = torch.randn(128, 3, 32, 32)
    counts: dict[str, list[int]] = {"scale_bias": [], "heads only": [], "PEFT LoRA": []}
    for tasks in (2, 8, 32, 128):
        which = torch.arange(128).remainder(tasks)[torch.randperm(128)].tolist()
        runs: dict[str, Callable[[], object]] = {}
        for name, plan in (("scale_bias", weft.scale_bias), ("heads only", weft.linear_probe)):
            model = make_model(base, plan, tasks)
            runs[name] = lambda m=model, w=which: m(x, task=w)
        adapted, names = peft_model(copy.deepcopy(base), tasks), [f"task{i}" for i in which]
        runs["PEFT LoRA"] = lambda m=adapted, n=names: m(x, adapter_names=n)
        for name, run in runs.items():
            run()
            with Count() as counter:
                run()
            counts[name].append(counter.count)
    with Count() as counter:
        base(x)
    print(f"operations for 2, 8, 32 and 128 tasks (the base alone: {counter.count}): {counts}")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int)
    every = [*PLANS, "peft", "operations"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(machine())
    torch.manual_seed(0)
    base = ResNet34().eval()
    x = torch.randn(ROWS, 3, given.side, given.side)
    with torch.inference_mode():
        for tasks in given.tasks:
            which = torch.arange(ROWS).remainder(tasks)[torch.randperm(ROWS)]
            for name in given.only:
                if name != "operations":
                    report(name, base, x, which, tasks, given.rounds)
        if "operations" in given.only:
            operations(base)


def report(
    name: str, base: nn.Module, x: torch.Tensor, which: torch.Tensor, tasks: int, rounds: int
) -> None:
    """One row: a mixed batch and tasks apart, to the base alone."""
    contestants: dict[str, Callable[[], object]] = {"base": lambda: base(x)}
    if name == "peft":
        adapted = peft_model(copy.deepcopy(base), tasks)
        name = "PEFT LoRA, r = 8"
        names = [f"task{i}" for i in which.tolist()]
        contestants["mixed"] = lambda: adapted(x, adapter_names=names)
    else:
        model = make_model(base, PLANS[name], tasks)
        names = [f"task {i}" for i in which.tolist()]
        rows = {n: (which == i).nonzero()[:, 0] for i, n in enumerate(model.task_names)}
        present = {n: index for n, index in rows.items() if len(index)}
        owned = max(model.ledger(n).own_fraction for n in model.task_names)
        name = f"{name} ({100 * owned:.0f} % owned)"
        contestants["mixed"] = lambda: model(x, task=names)
        contestants["apart"] = lambda: [model(x[i], task=n) for n, i in present.items()]
    seconds = paired(contestants, rounds)
    line = f"{x.shape[-1]} px, {tasks} tasks, {name}: base {milliseconds(seconds['base'])}"
    for contestant in contestants:
        if contestant != "base":
            line += f"; {contestant} {ratio(seconds, contestant, 'base')}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
