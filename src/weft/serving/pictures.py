"""Images that requests carry, refused before they are decoded or made rows of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weft.data.images import pixels_of
from weft.errors import DataError

from .inputs import FORMATS, IMAGES, InputSpec, Limits, RequestError, invalid


@final
class ImageReader:
    """Makes rows of encoded images.

    Args:
        spec: what the base takes.
        limits: what a request may cost.
    """

    def __init__(self, spec: InputSpec, limits: Limits) -> None:
        self._spec = spec
        self._limits = limits

    def rows(self, files: Sequence[bytes]) -> Tensor:
        """Rows from encoded images.

        Args:
            files: their bytes, of one or more.

        Returns:
            (images, channels, height, width), scaled as the base expects.

        Raises:
            RequestError: no images, too many pixels, sizes that differ, or images are not taken.
        """
        if not self._spec.reads_images:
            raise self.refusal()
        pixels = 0
        for data in files:
            with self._opened(data) as opened:
                pixels += opened.width * opened.height
        if pixels > IMAGES * self._limits.pixels:
            raise RequestError(
                413,
                "too_large",
                f"The images have {pixels:,} pixels; up to {IMAGES * self._limits.pixels:,} are "
                "decoded for a request.",
            )
        return torch.cat([self._image(data) for data in files])

    def refusal(self) -> RequestError:
        """The refusal of images."""
        message = "This base does not read images; send JSON."
        if self._spec.preprocessing is not None:
            message = (
                "Images are not taken, for the server does not know which size the base reads; "
                "its option --image-size says that. Send JSON."
            )
        return RequestError(415, "unsupported_media_type", message)

    @contextmanager
    def _opened(self, data: bytes) -> Iterator[Image.Image]:
        """An image of which nothing but its header has been read.

        Raises:
            RequestError: it is damaged, or has too many pixels.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(BytesIO(data), formats=tuple(FORMATS.values())) as opened:
                    self._check_size(*opened.size)
                    yield opened
        except RequestError:
            raise
        except DataError as error:
            raise invalid(str(error)) from None
        except Image.DecompressionBombError:
            raise self._too_many_pixels("very many") from None
        except Exception:  # decoders raise many types on damaged bytes
            raise invalid(
                f"The image cannot be read; expected a whole file of {', '.join(FORMATS)}."
            ) from None

    def _image(self, data: bytes) -> Tensor:
        """(1, channels, height, width)."""
        assert self._spec.preprocessing is not None
        with self._opened(data) as opened:
            if opened.format == "GIF":
                opened.load()  # a frame may be larger than the header says
                self._check_size(*opened.size)
            pixels = pixels_of(opened, self._spec.image_size)
        if self._spec.channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        try:
            row = self._spec.preprocessing(images)
        except DataError as error:
            raise invalid(str(error)) from None
        shape = self._spec.shape
        if shape is not None and tuple(row.shape[1:]) != shape:
            raise invalid(
                f"The image gives inputs of shape {list(row.shape[1:])}; expected {list(shape)}."
            )
        return row.contiguous()

    def _check_size(self, width: int, height: int) -> None:
        shape = self._spec.shape if self._spec.image_size is None else None
        if shape is not None and sorted((width, height)) != sorted(shape[1:]):  # it may be turned
            raise invalid(
                f"The image has {width} x {height} pixels; expected {shape[2]} x {shape[1]}."
            )
        if width * height > self._limits.pixels:
            raise self._too_many_pixels(f"{width} x {height}")

    def _too_many_pixels(self, found: str) -> RequestError:
        return RequestError(
            413,
            "too_large",
            f"The image has {found} pixels; up to {self._limits.pixels:,} are decoded.",
        )
