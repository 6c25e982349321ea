"""What is installed here, and whether weft works."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .bank import Bank
from .core.model import MultiTaskModel
from .methods.taps import taps
from .tasks import Classification
from .training import fit

REQUIRED = ("torch", "numpy", "safetensors", "accelerate", "torchmetrics", "pydantic", "rich")
OPTIONAL = ("timm", "torchvision", "transformers", "datasets", "peft", "tensorboard")


def examine() -> dict[str, str]:
    """Versions, devices, optional parts, and the outcome of a small run.

    Returns:
        What was looked at, with what was found; ``"self-check"`` starts with "ok" if a task could
        be trained, stored, and loaded again bit for bit.
    """
    found = {
        "weft": _version("weft-share"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": ", ".join(_devices()),
    }
    found |= {name: _version(name) for name in REQUIRED + OPTIONAL}
    found["self-check"] = _self_check()
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["Apple GPU"] if torch.backends.mps.is_available() else []
    return [f"CPU ({torch.get_num_threads()} threads)", *cuda, *mps]


def _self_check() -> str:
    try:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU())
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = MultiTaskModel(base, taps(base, warmup=1))
        model.add_task("check", Classification(2))
        x = torch.randn(32, 4)
        data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
        fit(model, {"check": (data, data)}, epochs=3, lr=0.1, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            bank = Bank(Path(folder) / "bank")
            bank.save(model)
            loaded = bank.load(base)
        model.cpu().eval()
        loaded.eval()
        with torch.no_grad():
            same = torch.equal(model.cpu()(x, task="check"), loaded(x, task="check"))
        unchanged = all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    except Exception as error:  # whatever is wrong with the installation is the finding
        return f"failed: {type(error).__name__}: {error}"
    if not (same and unchanged):
        return "failed: outputs or the base changed on the way through a file"
    return "ok: a task was trained, stored and loaded again bit for bit"
