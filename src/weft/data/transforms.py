"""What happens to a batch of images: augmentation, then preprocessing, on whole tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import DataError

# Rows resized at once: bounds the memory of float copies.
_CHUNK = 256


def _as_float(images: Tensor) -> Tensor:
    """Pixels as float32 in 0..1; floats are taken to be in that range already."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def resize(images: Tensor, size: int) -> Tensor:
    """Resize the largest centred square of each image, bilinear and antialiased.

    Args:
        images: N x C x H x W floats.
        size: side of the result in pixels, >= 1.

    Returns:
        N x C x size x size, of the same type.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == size:
        return square
    return F.interpolate(
        square, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def fit_square(images: Tensor, size: int) -> Tensor:
    """Keep the largest centred square of each image and resize it.

    Args:
        images: N x C x H x W, uint8.
        size: side of the result in pixels, >= 1.

    Returns:
        N x C x size x size, uint8.
    """
    parts = [
        resize(part.float(), size).round_().clamp_(0, 255).to(torch.uint8)
        for part in torch.split(images, _CHUNK)
    ]
    return torch.cat(parts)


def _check_images(images: Tensor, what: str) -> None:
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise DataError(
            f"{what} was given a {images.dtype} batch of shape {tuple(images.shape)}; expected "
            "images, N x C x H x W of uint8 or floats. Leave it out for other data."
        )


@final
@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the inputs that a base network was trained on.

    Args:
        mean: what is subtracted from pixels in 0..1, one value for each channel or a single one.
        std: what they are divided by, as many positive values. Grey images are repeated to as
            many channels as these have.
        image_size: side of the square that batches are resized to (the largest centred square of
            each image), or None to keep their size.

    Raises:
        DataError: a value is out of range.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    image_size: int | None = None

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise DataError(
                f"Preprocessing found mean={self.mean}, std={self.std}; expected as many means as "
                "deviations, and deviations above 0."
            )
        if self.image_size is not None and self.image_size < 1:
            raise DataError(f"image_size={self.image_size}; expected at least 1, or None.")

    @classmethod
    def imagenet(cls, image_size: int | None = None) -> Preprocessing:
        """The usual statistics of ImageNet, for most pretrained networks.

        Args:
            image_size: as in the class.

        Returns:
            The preprocessing, for RGB.
        """
        return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), image_size)

    @classmethod
    def symmetric(cls, image_size: int | None = None) -> Preprocessing:
        """Pixels scaled to -1..1, as TensorFlow's MobileNets expect.

        Args:
            image_size: as in the class.

        Returns:
            The preprocessing, for RGB.
        """
        return cls((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), image_size)

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare a batch.

        Args:
            images: N x C x H x W, uint8 or floats in 0..1.

        Returns:
            float32 images, normalised and resized.

        Raises:
            DataError: no images, or another number of channels than ``mean`` has.
        """
        _check_images(images, "Preprocessing")
        channels = images.shape[1]
        if len(self.mean) > 1 and channels not in (1, len(self.mean)):
            raise DataError(
                f"Preprocessing has {len(self.mean)} means and the images {channels} channels; "
                "expected as many, or one channel, or one mean."
            )
        pixels = _as_float(images)
        if self.image_size is not None:
            # Before the channels are repeated: resizing is the costly part.
            pixels = resize(pixels, self.image_size)
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (pixels - mean) / std


@final
@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, drawn from torch's global generator.

    They run in this order on the images as stored, before preprocessing. With dense targets
    (N x H x W, N x C x H x W) only ``flip``, ``brightness`` and ``contrast`` are possible; a flip
    turns the targets too.

    Args:
        flip: mirror each image left to right with probability one half.
        crop_padding: pad with zeros by this many pixels and crop back at a random place, >= 0.
        min_area: resize a random crop of this share or more of the image back to its size,
            0 < min_area <= 1; 1 leaves images alone.
        brightness: multiply pixels by a factor from 1 +- this, 0..1.
        contrast: multiply the distance from each image's mean by a factor from 1 +- this, 0..1.
        normals: whether dense targets are surface normals, N x 3 x H x W, whose first component
            points to the right: a flip turns it round (-x, or 255 - x in pictures of 0..255).

    Raises:
        DataError: a value is out of range.
    """

    flip: bool = True
    crop_padding: int = 0
    min_area: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    normals: bool = False

    def __post_init__(self) -> None:
        shares = {"brightness": self.brightness, "contrast": self.contrast}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise DataError(f"Augmentation found {name}={value}; expected 0..1.")
        if self.crop_padding < 0 or not 0 < self.min_area <= 1:
            raise DataError(
                f"Augmentation found crop_padding={self.crop_padding}, min_area={self.min_area}; "
                "expected a padding >= 0 and an area above 0 and at most 1."
            )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Change a batch at random.

        Args:
            images: N x C x H x W, uint8 or floats in 0..1.
            targets: N x ... targets.

        Returns:
            The changed images (uint8 stays uint8 unless pixels are interpolated or scaled), and
            the targets.

        Raises:
            DataError: no images, or dense targets with a crop.
        """
        _check_images(images, "Augmentation")
        dense = targets.ndim > 2
        if dense and (self.crop_padding or self.min_area < 1):
            raise DataError(
                f"Augmentation found dense targets of shape {tuple(targets.shape)} with a crop; "
                "expected crop_padding=0 and min_area=1. Set them, or augment in the data set."
            )
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
            if dense:
                shape = (-1, *[1] * (targets.ndim - 1))
                turned = _mirrored_normals(targets) if self.normals else targets
                targets = torch.where(mirrored.view(shape), turned.flip(-1), targets)
        if self.crop_padding:
            images = _shift(images, self.crop_padding)
        if self.min_area < 1:
            images = _zoom(images, self.min_area)
        if self.brightness or self.contrast:
            images = _relight(images, self.brightness, self.contrast)
        return images, targets


def _mirrored_normals(targets: Tensor) -> Tensor:
    if targets.ndim != 4 or targets.shape[1] != 3:
        raise DataError(
            f"Augmentation(normals=True) found targets of shape {tuple(targets.shape)}; expected "
            "surface normals, N x 3 x H x W."
        )
    right, rest = targets[:, :1], targets[:, 1:]
    return torch.cat([-right if targets.is_floating_point() else 255 - right, rest], dim=1)


def _shift(images: Tensor, padding: int) -> Tensor:
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    places = torch.randint(0, 2 * padding + 1, (len(images), 2)).tolist()
    # Slices copied at once: measured four times faster than one gather with index tensors.
    crops = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(padded.unbind(), places, strict=True)
    ]
    return torch.stack(crops)


def _zoom(images: Tensor, min_area: float) -> Tensor:
    count = len(images)
    side = (min_area + (1 - min_area) * torch.rand(count)).sqrt()
    centre = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    pixels = _as_float(images)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _relight(images: Tensor, brightness: float, contrast: float) -> Tensor:
    draws = 2 * torch.rand(2, len(images), 1, 1, 1) - 1
    pixels = _as_float(images) * (1 + brightness * draws[0])
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (pixels - mean) * (1 + contrast * draws[1])).clamp_(0, 1)
