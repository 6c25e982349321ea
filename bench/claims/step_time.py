"""Seconds of a training step of every method against full fine-tuning, paired in one process.

Run with: python bench/claims/step_time.py --data DIR
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from mobilenet import WEIGHTS_FILE, mobilenet_v2_035

import weft
from timing import machine, paired, ratio

HERE = Path(__file__).parent


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("WEFT_DATA"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("say where the data is: --data DIR or WEFT_DATA")
    print(machine())
    torch.manual_seed(0)
    base = mobilenet_v2_035(Path(arguments.data) / "weights" / WEIGHTS_FILE)
    base = base.to(memory_format=torch.channels_last)
    x = torch.randn(64, 3, 96, 96).to(memory_format=torch.channels_last)
    y = torch.randint(0, 7, (64,))
    steps = {}
    for name, cell in yaml.safe_load((HERE / "vision.yaml").read_text())["cells"].items():
        plan = weft.method(cell["method"], base, **cell.get("options", {}))
        model = weft.MultiTaskModel(base, plan, example=x[:1])
        model.add_task("t", weft.Classification(7))
        model.train()
        steps[name] = step(model, x, y)
    seconds = paired(steps, arguments.rounds)
    fine = statistics.median(seconds["full_finetune"])
    print(f"full_finetune: {1000 * fine:.0f} ms for a batch of 64 at 96 px")
    for name in steps:
        print(f"{name}: {ratio(seconds, name, 'full_finetune')} of full_finetune")


def step(model: weft.MultiTaskModel, x: torch.Tensor, y: torch.Tensor):
    """A whole training step of the one task."""
    optimizer = torch.optim.SGD(model.task_parameters("t"), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(model(x, task="t"), y) + model.penalty("t")).backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
