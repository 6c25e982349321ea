"""Small files that the data tests read."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Folder = Callable[..., Path]


def picture(shade: int, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    """An encoded image of one shade with a bright left column; ``size`` is width, height."""
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[:, 0] = 255
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def image_folder(tmp_path: Path) -> Folder:
    """Writes ``counts[class]`` images of distinct shades below a folder, and returns it."""

    def write(counts: dict[str, int], below: str = "images", shade: int = 0) -> Path:
        root = tmp_path / below
        for number, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for i in range(count):
                image = picture(shade + 40 * number + i)
                (root / name / f"{i:03d}.png").write_bytes(image)
        return root

    return write
