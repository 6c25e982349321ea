"""Networks and data of dynashare.py: street scenes with dense tasks, and a census."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import weft

SPLITS = ("train", "val", "test")
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
