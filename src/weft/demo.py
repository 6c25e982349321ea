"""The demo: one small base, four digit tasks that look different, several methods, one report."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .bank import Bank
from .core.model import MultiTaskModel
from .core.sharing import Sharing
from .methods.baselines import bias_only, full_finetune, linear_probe
from .methods.model_patches import scale_bias
from .methods.taps import taps
from .reporting import report
from .reports import Point, overview_figure
from .tasks import Classification
from .training import evaluate, fit

SIZE = 16
METHODS: dict[str, Callable[[nn.Module], Sharing]] = {
    "linear_probe": linear_probe,
    "bias_only": bias_only,
    "scale_bias": scale_bias,
    "taps": lambda base: taps(base, penalty=0.6, warmup=2),
    "full_finetune": full_finetune,
}
LEARNING_RATES = {"linear_probe": 0.1, "bias_only": 0.1, "scale_bias": 0.1}


class SmallNet(nn.Module):
    """A convolutional network with batch normalisation: (rows, 1, 16, 16) -> (rows, 64)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 32, 64, 64]
        layers: list[nn.Module] = []
        for i in range(4):
            stride = 2 if i in (1, 2) else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        features: Tensor = self.features(x)
        return features.mean((2, 3))


@dataclass(frozen=True)
class Digits:
    """One task's images and labels, split for training, validation and testing.

    Args:
        images: (rows, 1, 16, 16).
        labels: (rows,).
        classes: their number.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def loaders(self) -> dict[str, DataLoader[Any]]:
        """Batches of 60 %, 20 % and 20 % of the rows."""
        n = len(self.labels)
        bounds = {
            "train": (0, 3 * n // 5),
            "val": (3 * n // 5, 4 * n // 5),
            "test": (4 * n // 5, n),
        }
        return {
            split: DataLoader(
                TensorDataset(self.images[a:b], self.labels[a:b]),
                batch_size=32,
                shuffle=split == "train",
            )
            for split, (a, b) in bounds.items()
        }


def digit_tasks(seed: int = 0) -> tuple[Digits, dict[str, Digits]]:
    """Plain digits for the base, and four tasks on other digits.

    Args:
        seed: of the order and of the random changes.

    Returns:
        The base's data, and the tasks: dark on light, over photographs, turned by which angle, and
        odd or even over photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=generator)
    half = len(order) // 2
    base, x, y = order[:half], images[order[half:]], labels[order[half:]]
    turns = torch.randint(4, (len(y),), generator=generator)
    turned = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, turns, strict=True)])
    over_photo = (x - _photo_patches(len(y), generator)).abs()
    return Digits(images[base] * 2 - 1, labels[base], 10), {
        "inverted": Digits((1 - x) * 2 - 1, y, 10),
        "photo": Digits(over_photo * 2 - 1, y, 10),
        "angle": Digits(turned * 2 - 1, turns, 4),
        "parity": Digits((x - _photo_patches(len(y), generator)).abs() * 2 - 1, y % 2, 2),
    }


def _photo_patches(count: int, generator: torch.Generator) -> Tensor:
    """Random grey patches of scikit-learn's two photographs, (count, 1, 16, 16) in 0..1."""
    photos = [np.asarray(p, dtype=np.float32).mean(-1) / 255 for p in load_sample_images().images]
    small = [F.avg_pool2d(torch.from_numpy(p)[None, None], 4)[0, 0] for p in photos]
    patches = []
    for _ in range(count):
        photo = small[int(torch.randint(len(small), (), generator=generator))]
        top, left = (
            int(torch.randint(limit - SIZE, (), generator=generator)) for limit in photo.shape
        )
        patches.append(photo[top : top + SIZE, left : left + SIZE])
    return torch.stack(patches)[:, None]


def train_base(data: Digits, epochs: int, seed: int) -> nn.Module:
    """A base trained on plain digits, as any network is trained."""
    torch.manual_seed(seed)
    base = SmallNet()
    model = MultiTaskModel(base, full_finetune(base), example=data.images[:1])
    model.add_task("digits", Classification(10))
    fit(
        model,
        {"digits": data.loaders()["train"]},
        epochs=epochs,
        lr=0.05,
        seed=seed,
        progress=False,
    )
    return model.fold("digits").eval()


def run_demo(out: Path, *, epochs: int = 8, seed: int = 0, console: Console | None = None) -> Path:
    """Train, compare, store and report; takes about a minute on two cores.

    Args:
        out: folder for bank, figures and report; replaced where it exists.
        epochs: per task and method.
        seed: of everything.
        console: where to print.

    Returns:
        The report.
    """
    console = console or Console()
    started = time.perf_counter()
    base_data, tasks = digit_tasks(seed)
    console.print(
        f"[bold]One base, {len(tasks)} tasks.[/bold] Training a small base on plain digits ..."
    )
    base = train_base(base_data, epochs=6, seed=seed)
    loaders = {name: data.loaders() for name, data in tasks.items()}
    table = Table(title="Test accuracy in % (and % of the base that the task owns)")
    table.add_column("method", no_wrap=True)
    for name in tasks:
        table.add_column(name, justify="right")
    table.add_column("mean", justify="right")
    table.add_column("own", justify="right")
    points: list[Point] = []
    models: dict[str, MultiTaskModel] = {}
    for method, plan in METHODS.items():
        model = models[method] = MultiTaskModel(base, plan(base), example=base_data.images[:1])
        for name, data in tasks.items():
            torch.manual_seed(seed)
            model.add_task(name, Classification(data.classes))
        fit(
            model,
            {name: (splits["train"], splits["val"]) for name, splits in loaders.items()},
            epochs=epochs,
            lr=LEARNING_RATES.get(method, 0.02),
            head_lr=0.1,
            seed=seed,
            progress=False,
        )
        scores = evaluate(model, {name: splits["test"] for name, splits in loaders.items()})
        cells, own_bytes = [], 0
        for name in tasks:
            ledger = model.ledger(name)
            accuracy = scores[name]["accuracy"]
            own_bytes += ledger.own_bytes
            model.tasks[name].facts["metrics"]["test"] = scores[name]
            cells.append(f"{100 * accuracy:.1f} ({100 * ledger.own_fraction:.0f})")
            points.append(
                Point(
                    method=method,
                    task=name,
                    seed=seed,
                    score=accuracy,
                    own_bytes=ledger.own_bytes,
                    own_fraction=ledger.own_fraction,
                    metric="accuracy",
                )
            )
        mean = math.fsum(s["accuracy"] for s in scores.values()) / len(scores)
        table.add_row(method, *cells, f"{100 * mean:.1f}", f"{own_bytes / 1000:.0f} kB")
        console.print(f"  {method}: mean {100 * mean:.1f} %")
    console.print(table)

    # A bank of an earlier demo may hold another base.
    if (out / "bank" / "bank.json").exists():
        shutil.rmtree(out / "bank")
    bank = Bank(out / "bank")
    bank.save(models["taps"])
    loaded = bank.load(base)
    x = tasks["photo"].images[:8]
    loaded.eval()
    models["taps"].eval()
    with torch.no_grad():
        same = torch.equal(loaded(x, task="photo"), models["taps"](x, task="photo"))
    size = sum(f.stat().st_size for f in (out / "bank").rglob("*") if f.is_file())
    console.print(
        f"Stored {len(bank)} tasks of taps in {out / 'bank'} ({size / 1000:.0f} kB); "
        f"loaded again, outputs are {'bit-identical' if same else 'DIFFERENT'}."
    )
    page = report(bank, out / "report.html", comparison=points, title="weft demo: digits")
    overview_figure(points, out / "accuracy_against_bytes.png")
    console.print(f"Report: {page}   ({time.perf_counter() - started:.0f} s)")
    if not same:
        raise AssertionError("a loaded task differs from the stored one")
    return page
