"""Images: decoding into one tensor, and folders of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from weft.data.request import Request, listing
from weft.data.sets import TaskData
from weft.data.splitting import assemble, complete_splits
from weft.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
Pixels: TypeAlias = "npt.NDArray[np.uint8]"
# What people call the splits, and what we call them.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def decode_one(source: bytes | Path, image_size: int | None) -> Pixels:
    """Decode one image as RGB.

    Args:
        source: the encoded bytes, or a file.
        image_size: side of the square to resize to, or None to keep the size. The largest centred
            square is kept and resized with antialiasing.

    Returns:
        H x W x 3 pixels, uint8.
    """
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
        return pixels_of(opened, image_size)


def pixels_of(opened: Image.Image, image_size: int | None) -> Pixels:
    """Decode an image that has been opened, as `decode_one` does.

    Args:
        opened: the image; its pixels need not be read yet.
        image_size: as for `decode_one`.

    Returns:
        H x W x 3 pixels, uint8. Greys of 16 bits are scaled to 8.

    Raises:
        DataError: pixels of a kind whose range is not known.
    """
    if image_size is not None:
        # JPEG can decode at 1/2, 1/4, 1/8: twice the wanted size keeps the resize clean.
        opened.draft("RGB", (2 * image_size, 2 * image_size))
    image = _of_eight_bits(ImageOps.exif_transpose(opened), opened.format).convert("RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _of_eight_bits(image: Image.Image, format: str | None) -> Image.Image:
    """The image, in 8 bits if it has more: PIL would take 256 and all above for white.

    Raises:
        DataError: there is no saying what its white is.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.int64)  # 0..65535, in "I" as well
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"The image has pixels of 32 bits (mode {image.mode}), and nothing says which number "
            "is white. Convert it to 8 or 16 bits."
        )
    return image


def decode(request: Request, sources: Sequence[bytes | Path], names: Sequence[str]) -> Tensor:
    """Decode images into one tensor, on all cores.

    Args:
        request: holds ``image_size``, and the spec for messages.
        sources: N encoded images or files.
        names: what to call each in an error.

    Returns:
        N x 3 x H x W pixels, uint8.

    Raises:
        DataError: images are unreadable (all are counted and the first are named), or their sizes
            differ and no ``image_size`` was given.
    """

    def attempt(source: bytes | Path) -> Pixels | str:
        try:
            return decode_one(source, request.image_size)
        except Exception as error:  # decoders raise many types on damaged bytes
            return f"{type(error).__name__}: {error}"

    pixels: Tensor | None = None
    broken: list[str] = []
    sizes: dict[tuple[int, int], str] = {}
    # Decoding releases the interpreter lock; results are placed as they come.
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        for row, result in enumerate(pool.map(attempt, sources)):
            if isinstance(result, str):
                broken.append(f"{names[row]} ({result})")
                continue
            height, width = result.shape[:2]
            sizes.setdefault((height, width), names[row])
            if pixels is None:
                pixels = torch.empty((len(sources), 3, height, width), dtype=torch.uint8)
            if len(sizes) == 1:
                # A plain copy: `result` may be a read-only view of memory that PIL owns.
                pixels.numpy()[row] = result.transpose(2, 0, 1)
    if broken:
        raise request.error(
            f"{len(broken)} of {len(sources)} images cannot be read: {listing(broken, 5)}. "
            "Remove or replace them."
        )
    if len(sizes) > 1:
        examples = listing([f"{w}x{h} ({name})" for (h, w), name in sizes.items()], 4)
        raise request.error(
            f"found images of {len(sizes)} sizes: {examples}; expected one size, because images "
            "are held as one tensor. Give image_size, for instance 96; in a file also "
            "image_size: base, the size that the base was made for."
        )
    if pixels is None:
        raise request.error("found no images; expected at least one.")
    return pixels


def _subfolders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(hidden))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _by_class(request: Request, folder: Path) -> dict[str, list[Path]]:
    folders = _subfolders(folder)
    if not folders:
        loose = len(_images(folder))
        raise request.error(
            f"{folder} holds no class folders ({loose} images lie directly in it); expected one "
            "folder of images for each class. Move the images into folders named after classes."
        )
    found = {f.name: _images(f) for f in folders}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise request.error(
            f"{len(empty)} of {len(found)} class folders of {folder} hold no image: "
            f"{listing(empty)}; expected at least one in each. Fill or remove them "
            f"(read are {listing(sorted(SUFFIXES))})."
        )
    return found


def _layout(request: Request, folder: Path) -> dict[str, Path] | None:
    """The split folders, or None where the subfolders are the classes themselves."""
    named: dict[str, Path] = {}
    folders = _subfolders(folder)
    for sub in folders:
        split = SPLIT_FOLDERS.get(sub.name.lower())
        if split is None:
            continue
        if split in named:
            raise request.error(
                f"found both {named[split].name} and {sub.name} in {folder}; expected one folder "
                f"for the {split} split. Merge or rename one."
            )
        named[split] = sub
    # A class may be called "train" or "test": such folders are splits where one of them holds
    # folders, or where there is nothing else.
    nested = any(_subfolders(sub) for sub in named.values())
    alone = len(named) > 1 and len(named) == len(folders)
    return named if nested or alone else None


def read_imagefolder(request: Request) -> TaskData:
    """Read a folder of class folders, or train/val/test folders of class folders.

    Split folders may also be called training, valid, validation or testing; folders beside them
    are not read. Classes are the sorted folder names; images below a class folder belong to it.

    Args:
        request: what was asked for; the path is the folder.

    Returns:
        The data of the task, images as uint8 N x 3 x H x W in memory.

    Raises:
        DataError: missing folder, empty or unknown classes, unreadable images, several sizes.
    """
    folder = request.existing(folder=True)
    layout = _layout(request, folder)
    found = {
        split: _by_class(request, sub)
        for split, sub in ({"all": folder} if layout is None else layout).items()
    }
    # Without a train folder, the first split that exists names the classes.
    reference = "train" if "train" in found else next(iter(found))
    classes = tuple(sorted(found[reference]))
    for split, by_class in found.items():
        strange = sorted(set(by_class) - set(classes))
        if strange:
            raise request.unknown(
                f"class folders {listing(strange)} in {split} that {reference} does not have",
                strange[0],
                classes,
            )
    files, labels, owners = [], [], []
    for split, by_class in found.items():
        for name, paths in by_class.items():
            files += paths
            labels += [classes.index(name)] * len(paths)
            owners += [split] * len(paths)
    targets = torch.tensor(labels)
    fixed = None if layout is None else rows_by_name(owners)
    rows = complete_splits(fixed, targets, request)
    pixels = decode(request, files, [str(f.relative_to(folder)) for f in files])
    return assemble(request, pixels, targets, rows, classes)


def rows_by_name(owners: Sequence[str]) -> dict[str, Tensor]:
    """Row numbers grouped by the split each row belongs to.

    Args:
        owners: the split name of each row.

    Returns:
        Sorted row numbers by split name.
    """
    names = np.asarray(owners)
    return {str(n): torch.from_numpy(np.flatnonzero(names == n)) for n in np.unique(names)}
