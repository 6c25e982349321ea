"""`weft compare` with several processes against one, on small cells, in turns.

Whole commands are timed, with the start of Python: one after the other for the command and for its
processes if there are several, so that few cells do not gain what many do; phases.py says how long
it takes. The network is four small convolutions, the data are random images of 16 x 16 pixels.
Run on a machine that does nothing else:
python bench/comparing/jobs.py [--rounds 3] [--jobs 2] [--epochs 12] [--seeds 4]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing import machine, paired, ratio

BASE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = []
    for before, after in ((3, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def prepare(folder: Path, epochs: int, seeds: int) -> Path:
    """Write base, data and comparison; six cells for each seed.

    Args:
        folder: where to.
        epochs: of each cell.
        seeds: how many.

    Returns:
        The comparison's YAML file.
    """
    (folder / "net.py").write_text(BASE)
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        x = generator.integers(0, 256, (400, 3, 16, 16)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=generator.integers(0, 4, 400))
    content = {
        "base": {"name": "python:net.py:make"},
        "tasks": {name: {"data": f"npz:{name}.npz"} for name in ("one", "two")},
        "methods": ["scale_bias", "taps", "full_finetune"],
        "seeds": seeds,
        "train": {"epochs": epochs},
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, count = prepare(folder, given.epochs, given.seeds), iter(range(1000))

        def compare(jobs: int) -> None:
            command = [sys.executable, "-m", "weft", "compare", config.name, "--jobs", str(jobs)]
            output = ["--set", f"output=run{next(count)}", "--json"]
            done = subprocess.run([*command, *output], cwd=folder, capture_output=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr.decode())

        several = f"{given.jobs} jobs"
        seconds = paired(
            {"1 job": lambda: compare(1), several: lambda: compare(given.jobs)}, given.rounds
        )
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    for name, values in seconds.items():
        print(f"{name}: median {statistics.median(values):.1f} s of {len(values)}")
    print(f"1 job over {several}: {ratio(seconds, '1 job', several)}")


if __name__ == "__main__":
    main()
