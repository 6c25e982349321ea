"""Which blocks does each task execute: AdaShare and DynaShare on one input with several tasks.

- camvid: street scenes; the class of each pixel, the distance of each pixel to the nearest border
  between classes, and which of four classes are in the picture;
- census: three yes-or-no questions about a person.

All networks train from scratch, and all cells of a seed start from the same weights. The last epoch
is reported, so no choice is made on test data; validation scores stand beside it. ``--smoke`` runs
two steps of four epochs of each cell into a folder of its own, to see that everything works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import torch
import yaml
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import weft

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")
Config = dict[str, Any]
Inputs = dict[str, Tensor]

# --------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """relu(around(x) + bn(conv(relu(bn(conv(x)))))), two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.around(x) + branch)


class DenseResNet(nn.Module):
    """A narrow ResNet-18 whose last two stages are dilated, as AdaShare's: stride 8, 48 channels.

    The 7x7 convolution at its start is a 3x3 one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs, stride, dilation in ((16, 1, 1), (24, 2, 1), (32, 1, 2), (48, 1, 4)):
            blocks += [Block(inputs, outputs, stride, dilation)]
            blocks += [Block(outputs, outputs, 1, dilation)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(image))), 3, 2, 1)
        return self.blocks(x)


class ResidualLayer(nn.Module):
    """x + down(relu(up(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """Embedded codes and numbers of a table row to 64 features."""

    def __init__(self, codes: int, columns: int, numbers: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes, 4)
        self.enter = nn.Linear(4 * columns + numbers, width)
        self.blocks = nn.Sequential(*(ResidualLayer(width) for _ in range(8)))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([self.embed(codes).flatten(1), numbers], 1)
        return self.norm(self.blocks(self.enter(x)))


# ------------------------------------------------------------------------------------- data


@dataclass
class Problem:
    """One input and the tasks on it.

    Args:
        base: makes a network.
        tasks: by name.
        parts: by split, tensors of inputs and of targets.
        flip: mirror training images at random, with all targets that are maps.
    """

    base: Callable[[], nn.Module]
    tasks: dict[str, weft.Task]
    parts: dict[str, tuple[Inputs, Inputs]]
    flip: bool

    def first(self, split: str, rows: int) -> Inputs:
        """The inputs of the first rows of a split."""
        return {name: x[:rows] for name, x in self.parts[split][0].items()}

    def loaders(self, batch: int, rows: int | None) -> dict[str, DataLoader[Any]]:
        """Batches ``(x, {task: y})`` by split, of all rows or the first ones."""
        found: dict[str, DataLoader[Any]] = {}
        for split, (inputs, targets) in self.parts.items():
            train = split == "train"
            count = len(next(iter(inputs.values())))
            found[split] = DataLoader(
                range(count if rows is None else min(rows, count)),  # type: ignore[arg-type]
                batch_size=batch if train else 4 * batch,
                shuffle=train,
                collate_fn=partial(gather, inputs, targets, self.flip and train),
            )
        return found


def gather(inputs: Inputs, targets: Inputs, flip: bool, rows: list[int]) -> tuple[Inputs, Inputs]:
    """A batch of rows."""
    index = torch.tensor(rows)
    x = {name: tensor[index] for name, tensor in inputs.items()}
    y = {name: tensor[index] for name, tensor in targets.items()}
    if not flip:
        return x, y
    mirrored = torch.rand(len(rows)) < 0.5
    return mirror(x, mirrored), mirror(y, mirrored)


def mirror(tensors: Inputs, chosen: Tensor) -> Inputs:
    """Maps and images of the chosen rows mirrored left to right; what is no map stays."""
    found = {}
    for name, tensor in tensors.items():
        which = chosen.reshape(-1, *(1,) * (tensor.dim() - 1))
        found[name] = torch.where(which, tensor.flip(-1), tensor) if tensor.dim() > 2 else tensor
    return found


PRESENT = ("pole", "signsymbol", "car", "pedestrian")
"""Classes that some pictures of every split show on more than 1 % of their pixels, and some not."""

VOID = 11


def camvid(data: Path) -> Problem:
    """Street scenes and what is derived from the classes of their pixels."""
    with np.load(data / "camvid.npz") as file:
        names = [str(name) for name in file["classes"]]
        images = {s: decode(file[f"jpg_{s}"], file[f"off_{s}"]) for s in SPLITS}
        labels = {s: file[f"seg_{s}"].astype(np.int64) for s in SPLITS}
    mean, std = images["train"].mean((0, 2, 3)), images["train"].std((0, 2, 3))
    places = [names.index(name) for name in PRESENT]
    parts = {}
    for split, maps in labels.items():
        shown = np.stack([(maps == place).mean((1, 2)) > 0.01 for place in places], 1)
        pixels = (images[split] - mean[:, None, None]) / std[:, None, None]
        targets = {
            "segmentation": torch.from_numpy(maps),
            "distance": torch.from_numpy(np.stack([distance(one) for one in maps])),
            "presence": torch.from_numpy(shown.astype(np.float32)),
        }
        parts[split] = ({"image": torch.from_numpy(pixels)}, targets)
    tasks = {
        "segmentation": weft.Segmentation(names[:VOID], ignore=VOID),
        "distance": weft.DenseRegression(invalid=-1.0),
        "presence": weft.Binary(PRESENT),
    }
    return Problem(DenseResNet, tasks, parts, flip=True)


def decode(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Packed JPEG files to (N, 3, H, W) floats in 0..1."""
    pictures = [
        np.asarray(Image.open(BytesIO(data[start:end].tobytes())).convert("RGB"))
        for start, end in pairwise(offsets.tolist())
    ]
    return np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 255


def distance(labels: np.ndarray, most: float = 8.0) -> np.ndarray:
    """How far each pixel is from a border between two classes, up to 8 pixels, as 0..1; void -1."""
    border = np.zeros(labels.shape, bool)
    border[:-1] |= differ(labels[:-1], labels[1:])
    border[:, :-1] |= differ(labels[:, :-1], labels[:, 1:])
    found = np.minimum(distance_transform_edt(~border), most) / most
    return np.where(labels == VOID, -1.0, found).astype(np.float32)


def differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two neighbours are of different classes, both known."""
    return (one != other) & (one != VOID) & (other != VOID)


def census(data: Path) -> Problem:
    """Rows of a census: 31 columns of codes, 7 of numbers, standardised by the training rows."""
    questions = ("income", "never_married", "college")
    with np.load(data / "census_income_kdd.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
    sizes = 1 + np.max([arrays[f"x_cat_{s}"].max(0) for s in SPLITS], axis=0).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    mean, std = arrays["x_num_train"].mean(0), arrays["x_num_train"].std(0)
    parts = {}
    for split in SPLITS:
        codes = arrays[f"x_cat_{split}"].astype(np.int64) + starts
        numbers = (arrays[f"x_num_{split}"] - mean) / std
        inputs = {"codes": torch.from_numpy(codes), "numbers": torch.from_numpy(numbers)}
        targets = {q: torch.from_numpy(arrays[f"y_{q}_{split}"]).float() for q in questions}
        parts[split] = (inputs, targets)
    base = partial(ResidualMLP, int(sizes.sum()), len(sizes), len(mean))
    return Problem(base, {q: weft.Binary() for q in questions}, parts, flip=False)


PROBLEMS: dict[str, Callable[[Path], Problem]] = {"camvid": camvid, "census": census}

# ----------------------------------------------------------------------------- measurements


def new_model(
    problem: Problem, base: nn.Module, cell: Config, example: Inputs, seed: int
) -> weft.MultiTaskModel:
    """A model with all tasks by the plan of a cell."""
    options = dict(cell.get("options", {}))
    if cell["method"] in ("adashare", "dynashare"):
        options |= {"example": example, "seed": seed}
    model = weft.MultiTaskModel(base, weft.method(cell["method"], base, **options), example=example)
    torch.manual_seed(seed)  # heads start alike, whatever the plan has drawn
    for name, task in problem.tasks.items():
        model.add_task(name, task)
    return model


@torch.no_grad()
def executed(model: weft.MultiTaskModel, batches: DataLoader[Any]) -> dict[str, dict[str, Config]]:
    """By task and block, whether the policy executes it, and the share of rows that run it."""
    blocks = model.sharing.options.get("blocks", {})
    rows, opened = 0, {task: dict.fromkeys(blocks, 0.0) for task in model.task_names}
    chosen: dict[str, Any] = {
        task: {b: bool(model.tasks[task].own.to_dict()[f"{b}:execute"]) for b in blocks}
        for task in model.task_names
    }
    for x, _ in batches if blocks else ():
        count = len(next(iter(x.values())))
        rows += count
        inputs = dict.fromkeys(model.task_names, x)
        records = model.step(inputs, charge=dict.fromkeys(inputs, 0.0)).records
        for task, shares in opened.items():
            for block in blocks:
                record = records[task].get(block, {})
                gate = record["gate"].float().sum().item() if "gate" in record else count
                shares[block] += gate * chosen[task][block]
    return {
        task: {
            b: {"policy": chosen[task][b], "rows": shares[b] / rows, "gated": gated(model, b)}
            for b in blocks
        }
        for task, shares in opened.items()
    }


def gated(model: weft.MultiTaskModel, block: str) -> bool:
    """Whether a block has a gate that decides for each row."""
    return any(key.startswith(f"{block}:gate.") for key in model.shared.to_dict())


def mean_share(found: Mapping[str, Mapping[str, Config]], what: str) -> dict[str, float]:
    """By task, the mean over blocks; 1 where there is no policy."""
    return {
        task: statistics.mean(float(share[what]) for share in blocks.values()) if blocks else 1.0
        for task, blocks in found.items()
    }


@torch.inference_mode()
def milliseconds(
    models: Mapping[str, weft.MultiTaskModel], x: Inputs, rows: int, repeats: int
) -> dict[str, dict[str, float]]:
    """By model and task, the median time of a forward per row, the models in turn."""
    tasks = next(iter(models.values())).task_names
    times: dict[str, dict[str, list[float]]] = {m: {t: [] for t in tasks} for m in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            for task in tasks:
                started = time.perf_counter()
                model(x, task=task)
                if repeat > 1:  # the first ones warm up
                    times[name][task].append(time.perf_counter() - started)
    return {
        name: {task: 1000 * statistics.median(t) / rows for task, t in by_task.items()}
        for name, by_task in times.items()
    }


def speed(
    model: weft.MultiTaskModel, plain: weft.MultiTaskModel, problem: Problem, rows: int
) -> Config:
    """What a forward costs per row, in time and in multiply-adds, against plain sharing."""
    x = problem.first("test", rows)
    model.eval()
    plain.eval()
    times = milliseconds({"this": model, "plain": plain}, x, rows, 200 if rows == 1 else 30)
    cost, full = weft.multiply_adds(model, x), weft.multiply_adds(plain, x)
    return {
        "rows": rows,
        "milliseconds": times["this"],
        "plain_milliseconds": times["plain"],
        "multiply_adds": {task: cost.of(task) / rows for task in model.task_names},
        "plain_multiply_adds": {task: full.of(task) / rows for task in model.task_names},
    }


def run_cell(config: Config, data: Path, name: str, cell: str, seed: int) -> Config:
    """Train, score and time one cell."""
    started = time.perf_counter()
    about, settings = config["data"][name], config["cells"][cell]
    problem = PROBLEMS[name](data)
    batches = problem.loaders(about["batch_size"], config.get("rows"))
    example = problem.first("train", 2)
    torch.manual_seed(seed)
    base = problem.base()
    model = new_model(problem, base, settings, example, seed)
    epochs = about["epochs"] * (2 if settings.get("twice") else 1)
    history = weft.fit(
        model,
        (batches["train"], batches["val"]),
        epochs=epochs,
        steps=config.get("steps"),
        lr=config["lr"],
        optimizer="adamw",
        weight_decay=config["weight_decay"],
        weights=about["weights"],
        keep="last",
        seed=seed,
        progress=False,
    )
    rows = {task: history[task] for task in model.task_names}
    test = weft.evaluate(model, batches["test"])
    blocks = executed(model.eval(), batches["test"])
    plain = new_model(problem, base, config["cells"]["plain"], example, seed)
    first = next(iter(rows.values()))
    return {
        "data": name,
        "cell": cell,
        "seed": seed,
        "settings": settings,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in base.parameters()),
        "tasks": {
            task: {
                "test": test[task],
                "val": of_task[-1]["val"],
                "val_by_epoch": [next(iter(row["val"].values())) for row in of_task],
                "own_fraction": model.ledger(task).own_fraction,
                "executed_by_epoch": [row["executed"] for row in of_task if "executed" in row],
            }
            for task, of_task in rows.items()
        },
        "blocks": blocks,
        "executed_by_policy": mean_share(blocks, "policy"),
        "executed": mean_share(blocks, "rows"),
        "speed": [speed(model, plain, problem, count) for count in about["timing_rows"]],
        "phases": [row["phase"] for row in first],
        "fit_seconds": sum(row["seconds"] for row in first),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run all cells that are not there yet."""
    parser = fleet.arguments(__doc__, HERE / "results" / "dynashare")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each cell, one seed")
    given = parser.parse_args()
    config = yaml.safe_load((HERE / "dynashare.yaml").read_text())
    out = given.out
    if given.smoke:
        few = {"epochs": 4, "batch_size": 8, "timing_rows": [1, 8]}
        config["data"] = {name: {**about, **few} for name, about in config["data"].items()}
        config |= {"seeds": [0], "steps": 2, "rows": 48}
        out = out.with_name(out.name + "-smoke")
    cells = [
        (name, cell, seed)
        for seed in config["seeds"]
        for name in config["data"]
        for cell in config["cells"]
    ]
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)


if __name__ == "__main__":
    main()
