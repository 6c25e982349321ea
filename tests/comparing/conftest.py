"""A small comparison on files: a base in a Python file, two data sets, and its YAML."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

BASE = """
import os
from pathlib import Path

import torch
from torch import nn

def make(width=4, log=None):
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\\n")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )
"""


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """The content of a comparison of two methods on two tasks; everything lies in one folder."""
    (tmp_path / "net.py").write_text(textwrap.dedent(BASE))
    generator = np.random.default_rng(0)
    for name in ("bright", "red"):
        x = generator.integers(0, 256, (60, 3, 6, 6)).astype(np.uint8)
        y = generator.integers(0, 2, 60)
        x[y == 1, 0 if name == "red" else slice(None)] //= 2
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    return {
        "base": {"name": f"python:{tmp_path / 'net.py'}:make"},
        "tasks": {n: {"data": f"npz:{tmp_path / n}.npz"} for n in ("bright", "red")},
        "methods": ["scale_bias", {"name": "hard_sharing", "train": {"lr": 0.02}}],
        "data": {"batch_size": 16},
        "train": {"epochs": 2, "lr": 0.05},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def config(tmp_path: Path, content: dict[str, Any]) -> Path:
    """The same as a YAML file."""
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new processes import no torchvision, which may not match this build of torch."""
    import sys

    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("vision")])
    monkeypatch.delenv("PYTHONPATH", raising=False)
