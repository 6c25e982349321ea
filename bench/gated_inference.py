"""Instance-gated inference: does the time follow the share of blocks that run?

A ResNet-34 with gates (`weft.dynashare`) at the last 8 of its 16 blocks, which is the default, or
at all 16, where little is left beside what gates cost. Gates are computed as always; their
decisions are then forced, so that a stated share of (row, gated block) pairs runs. The ideal is the
time of the same network without gates, all gated blocks skipped, plus that share of their time; for
one row, the time of a network that consists of the open blocks only.

Run with: python bench/gated_inference.py [rounds] [threads]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import weft
from resnet import ResNet34
from timing import machine, milliseconds, paired

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def gated_model(base: nn.Module, example: Tensor, gated: int) -> weft.MultiTaskModel:
    """One task that executes every block, the last ones behind gates, as after training."""
    target = (1.0,) * (16 - gated) + (0.5,) * gated
    plan = weft.dynashare(base, example=example, target=target)
    model = weft.MultiTaskModel(base, plan).eval()
    model.add_task("task", weft.Task(head=None, loss=nn.functional.mse_loss))
    for block in list(plan.options["blocks"])[16 - gated :]:
        model.tasks["task"].own[f"{block}:gated"].fill_(True)
    return model


def forced(model: weft.MultiTaskModel, opened: dict[str, Tensor]) -> weft.View:
    """A view whose gates decide as told, (rows,) for each block.

    One decision is a large bias; decisions that differ between rows replace the gates' scores.
    """
    view = model.view("task")

    def decide(choice: Tensor) -> Callable[..., Tensor]:
        scores = torch.stack([~choice, choice], 1).float()
        return lambda _module, _args, _scores: scores

    for site, choice in opened.items():
        bias = 1e4 if choice[0] else -1e4
        with torch.no_grad():
            model.shared[f"{site}:gate.choose.bias"].copy_(torch.tensor([0.0, bias]))
        if len(choice) > 1:
            gate = view.structure.get_submodule(site).adapter.gate
            gate.register_forward_hook(decide(choice))
    return view


def decisions(blocks: Sequence[str], share: float, rows: int) -> dict[str, Tensor]:
    """Which rows run which block: a share of the rows, or of the blocks if there is one row."""
    opened = {}
    for i, block in enumerate(blocks):
        if rows == 1:
            opened[block] = torch.tensor([int((i + 1) * share) > int(i * share)])
        else:
            opened[block] = torch.randperm(rows) < round(share * rows)
    return opened


def without_gates(
    base: nn.Module, shortcuts: dict[str, str], opened: dict[str, Tensor]
) -> nn.Module:
    """The network of the blocks that run for the first row: plain modules, nothing inserted."""
    model = weft.MultiTaskModel(base, weft.adashare(base, blocks=shortcuts)).eval()
    model.add_task("task", weft.Task(head=None, loss=nn.functional.mse_loss))
    for block, choice in opened.items():
        model.tasks["task"].own[f"{block}:execute"].fill_(bool(choice[0]))
    return model.fold("task")


def measure(gated: int, rows: int, rounds: int, size: int = 224) -> None:
    """Print a row per share."""
    base = ResNet34().eval()
    x = torch.randn(rows, 3, size, size)
    model = gated_model(base, x[:1], gated)
    shortcuts = model.sharing.options["blocks"]
    blocks = tuple(shortcuts)[16 - gated :]

    print(f"{gated} of 16 blocks gated, {rows} row(s) of {size} x {size}; plain: the base")
    for share in SHARES:
        opened = decisions(blocks, share, rows)
        contestants: dict[str, nn.Module] = {
            "gated": forced(model, opened),
            "plain": base,
            "none": without_gates(base, shortcuts, decisions(blocks, 0.0, rows)),
        }
        if rows == 1:
            contestants["open"] = without_gates(base, shortcuts, opened)
        with torch.inference_mode():
            seconds = paired({n: lambda m=m: m(x) for n, m in contestants.items()}, rounds)
        if rows == 1:
            ideal = seconds["open"]
        else:
            pairs = zip(seconds["none"], seconds["plain"], strict=True)
            ideal = [none + share * (full - none) for none, full in pairs]
        ratios = sorted(g / i for g, i in zip(seconds["gated"], ideal, strict=True))
        quarter = len(ratios) // 4
        print(
            f"share {share:4.2f}: gated {milliseconds(seconds['gated'])}, ideal "
            f"{milliseconds(ideal)}, plain {milliseconds(seconds['plain'])}; gated / ideal "
            f"{statistics.median(ratios):.3f} (quartiles {ratios[quarter]:.3f} to "
            f"{ratios[-1 - quarter]:.3f})"
        )


def main() -> None:
    """One row, and a batch of 32."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(0)
    print(machine())
    for gated in (8, 16):
        measure(gated, 1, 3 * rounds)
        measure(gated, 32, rounds)


if __name__ == "__main__":
    main()
