"""What requests carry: JSON numbers and images, checked before they cost anything, as tensors."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from weft.data import Preprocessing
from weft.errors import DataError, WeftError

FORMATS = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
}
"""Types of images that are taken, with the names of their decoders."""


@final
class Names(Enum):
    """Whether a body names tasks."""

    NONE = "none"
    OPTIONAL = "for all rows, or none at all"
    PER_ROW = "one for each row"


_DTYPES = {"float32": torch.float32, "int64": torch.int64}

ROW = 100_000_000
"""Numbers that one row may have."""

IMAGES = 4
"""All images of a request may have so many times the pixels of one."""


class RequestError(WeftError):
    """A request that gets no answer.

    Args:
        status: of the response, 4xx or 503.
        code: a word for programs.
        message: a sentence for people.
        headers: further ones of the response.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


@final
@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Args:
        body: bytes of a request's body.
        pixels: of an image, width times height, before it is decoded; all images of a request
            may have `IMAGES` times as many.
        numbers: in a JSON body.
        body_seconds: for a body to arrive.
    """

    body: int = 10_000_000
    pixels: int = 25_000_000
    numbers: int = 2_000_000
    body_seconds: float = 30.0


@final
@dataclass(frozen=True)
class InputSpec:
    """What the base takes.

    Args:
        shape: of one row; None if it is not known, which turns off what depends on it: a single
            row without the axis of rows, and a refusal of wrong shapes before the base sees them.
        dtype: "float32", or "int64" for bases that read whole numbers.
        image_size: side of the square that uploaded images are cut and resized to; None to keep
            their size, which then has to be that of ``shape``.
        preprocessing: how pixels become inputs; None if the base does not read images.

    Raises:
        DataError: an unknown dtype, or a shape that no row can have.
    """

    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    image_size: int | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise DataError(f"Inputs are of {' or '.join(_DTYPES)}, found '{self.dtype}'.")
        if self.shape is not None:
            check_shape(self.shape)

    @property
    def reads_images(self) -> bool:
        """Whether images are taken: what they cost is known only where their size is."""
        sized = self.image_size is not None or (self.shape is not None and len(self.shape) == 3)
        return self.preprocessing is not None and sized

    @property
    def channels(self) -> int:
        """Channels of the images that the base reads."""
        return 3 if self.shape is None else self.shape[0]


def check_shape(shape: Sequence[int]) -> None:
    """Refuse what no row's shape is.

    Raises:
        DataError: sizes below 1, or very many numbers.
    """
    if min(shape, default=1) < 1 or math.prod(shape) > ROW:
        raise DataError(
            f"A row has the shape {list(shape)}; expected sizes of 1 and more, and up to {ROW:,} "
            "numbers."
        )


@final
class InputReader:
    """Makes tensors of what requests carry.

    Args:
        spec: what the base takes.
        limits: what a request may cost.
    """

    def __init__(self, spec: InputSpec, limits: Limits) -> None:
        self.spec = spec
        self.limits = limits

    def document(self, body: bytes) -> dict[str, Any]:
        """A JSON object.

        Args:
            body: its bytes.

        Raises:
            RequestError: it is none, or has more numbers than a request may have.
        """
        count = body.count(b",") + 1
        if count > self.limits.numbers:
            raise RequestError(
                413,
                "too_large",
                f"The body has about {count:,} values; {self.limits.numbers:,} may be sent.",
            )
        try:
            found = json.loads(body, parse_constant=_refuse_constant)
        except RecursionError:
            raise RequestError(400, "malformed", "The JSON is nested too deeply.") from None
        except ValueError as error:
            raise RequestError(400, "malformed", f"The body is not JSON: {error}.") from None
        if not isinstance(found, dict):
            raise invalid("The body is a JSON object, for instance {'inputs': [...]}.")
        return found

    def rows(self, value: Any) -> Tensor:
        """Rows of numbers.

        Args:
            value: nested lists: rows, or a single row where the shape of rows is known.

        Returns:
            (rows, ...).

        Raises:
            RequestError: not numbers, not rectangular, or of another shape than the base takes.
        """
        if not isinstance(value, list):
            raise invalid("'inputs' are nested lists of numbers.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                array = np.array(value)
        except (ValueError, OverflowError, RecursionError, Warning):
            raise invalid("'inputs' are not rectangular: lists differ in length.") from None
        whole = self.spec.dtype == "int64"
        if array.size and (array.dtype.kind not in ("i" if whole else "if") or _has_bools(value)):
            kind = "whole numbers" if whole else "numbers"
            raise invalid(f"'inputs' holds something else than {kind}, or too large ones.")
        shape = self.spec.shape
        if shape is not None and array.shape == shape:
            array = array[None]
        if shape is not None and array.shape[1:] != shape:
            raise invalid(
                f"'inputs' has the shape {list(array.shape)}; expected rows of shape "
                f"{list(shape)}, or one such row."
            )
        if not array.size:
            raise invalid("'inputs' is empty.")
        with np.errstate(over="ignore"):
            tensor = torch.from_numpy(array.astype(self.spec.dtype))
        if not tensor.isfinite().all():
            raise invalid("'inputs' has numbers outside the range of 32 bits.")
        return tensor


def invalid(message: str) -> RequestError:
    """The refusal of a body that was understood and cannot be used."""
    return RequestError(422, "invalid_input", message)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _has_bools(value: list[Any]) -> bool:
    """Whether there is a true or false in nested lists, which numpy takes for a number."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if part and not isinstance(part[0], list):
            if bool in set(map(type, part)):
                return True
        else:
            waiting += part
    return False
