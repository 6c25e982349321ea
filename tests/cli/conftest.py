"""A small experiment on files: a base in a Python file, two data sets, and its YAML."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from weft import cli


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """The path of a YAML file for two tasks under TAPS; everything lies beside it."""
    (tmp_path / "net.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def make(width=8):
                torch.manual_seed(0)
                return nn.Sequential(
                    nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                )
            """
        )
    )
    generator = np.random.default_rng(0)
    for name in ("bright", "red"):
        x = generator.integers(0, 256, (90, 3, 8, 8)).astype(np.uint8)
        y = generator.integers(0, 2, 90)
        x[y == 1, 0 if name == "red" else slice(None)] //= 2
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    content = {
        "base": {"name": f"python:{tmp_path / 'net.py'}:make"},
        "method": {"name": "taps", "penalty": 0.3, "warmup": 1},
        "tasks": {n: {"data": f"npz:{tmp_path / n}.npz", "classes": 2} for n in ("bright", "red")},
        "data": {"batch_size": 16},
        "train": {"epochs": 3, "lr": 0.05},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def weft_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: ``weft_command("train", ...) -> (code, out, err)``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["weft", *map(str, arguments)])
        monkeypatch.setattr(cli, "out", cli.Console(width=160))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        code = stop.value.code
        return (0 if code is None else int(code)), captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
