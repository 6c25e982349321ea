"""All tasks of one input against the ideal: what they share once, then each task's own part.

ResNet-34, 8 rows. The ideal is made of plain modules: the shared blocks run once, then for each
task its own blocks and head. With own bottoms nothing can be shared: one forward per task.

Run with: python bench/serving/one_input.py [--rounds 9] [--side 96] [--tasks 2 8 32]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import weft
from resnet import ResNet34
from timing import machine, milliseconds, paired, ratio

ROWS, CUT = 8, 13
"""Rows of the input, and the first block that tasks with own tops own."""


def make_model(base: nn.Module, own: list[str], tasks: int) -> weft.MultiTaskModel:
    """Tasks that differ in the named modules."""
    plan = weft.hard_sharing(base, own=own, batchnorm="follow")
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(2, 3, 32, 32))
    for number in range(tasks):
        model.add_task(f"task {number}", weft.Classification(10))
        with torch.no_grad():
            for tensor in model.tasks[f"task {number}"].own.values():
                if tensor.is_floating_point():
                    tensor.mul_(1.0 + 0.01 * number)
    return model.eval()


def ideal(model: weft.MultiTaskModel) -> Callable[[Tensor], dict[str, Tensor]]:
    """The shared part once, then the tops of all tasks, in plain modules."""
    plain = {task: model.fold(task).eval() for task in model.task_names}
    first = next(iter(plain.values()))
    prefix = nn.Sequential(first.stem, *first.blocks[:CUT])
    tops = {task: net.blocks[CUT:] for task, net in plain.items()}
    heads = {task: model.head(task) for task in plain}

    def run(x: Tensor) -> dict[str, Tensor]:
        shared = prefix(x)
        return {task: heads[task](top(shared).mean((2, 3))) for task, top in tops.items()}

    return run


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(machine())
    torch.manual_seed(0)
    base = ResNet34().eval()
    x = torch.randn(ROWS, 3, given.side, given.side)
    tops = [f"blocks.{i}" for i in range(CUT, 16)]
    with torch.inference_mode():
        for tasks in given.tasks:
            model = make_model(base, tops, tasks)
            best = ideal(model)
            found, expected = model.predict_all(x), best(x)
            worst = max(float((found[t] - expected[t]).abs().max()) for t in found)
            contestants: dict[str, Callable[[], object]] = {
                "ideal": lambda b=best: b(x),
                "predict_all": lambda m=model: m.predict_all(x),
            }
            seconds = paired(contestants, given.rounds)
            print(
                f"own tops, {tasks} tasks: ideal {milliseconds(seconds['ideal'])}; predict_all "
                f"{ratio(seconds, 'predict_all', 'ideal')} of it; largest difference {worst:.1e}",
                flush=True,
            )
        for name, own in (("heads only", "nothing"), ("own bottoms", ["stem"])):
            for tasks in given.tasks:
                model = make_model(base, own, tasks)
                contestants = {
                    "base": lambda: base(x),
                    "predict_all": lambda m=model: m.predict_all(x),
                }
                seconds = paired(contestants, given.rounds)
                line = f"{name}, {tasks} tasks: {ratio(seconds, 'predict_all', 'base')} forwards"
                print(line, flush=True)


if __name__ == "__main__":
    main()
