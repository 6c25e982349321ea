"""Image folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.data import ArrayData, load
from weft.errors import DataError

Folder = Callable[..., Path]


def stored(split: object) -> ArrayData:
    assert isinstance(split, ArrayData)
    return split


def test_class_folders_become_labels_and_pixels(image_folder: Folder) -> None:
    root = image_folder({"cat": 10, "ant": 10})
    data = load(f"imagefolder:{root}", val=0.2, test=0.2)
    assert data.classes == ("ant", "cat")
    assert data.input_shape == (3, 8, 12)
    assert [len(stored(s)) for s in data.splits.values()] == [12, 4, 4]
    for split in data.splits.values():
        for x, y in (stored(split)[i] for i in range(len(stored(split)))):
            assert isinstance(x, torch.Tensor)
            assert x.dtype == torch.uint8
            assert (x[:, :, 0] == 255).all()
            # "cat" was written first: shades 0..9; "ant" has 40..49.
            assert (int(x[0, 0, 5]) >= 40) == (int(y) == 0)


def test_split_folders_are_kept_and_validation_comes_from_training(image_folder: Folder) -> None:
    image_folder({"a": 10, "b": 10}, "set/train")
    root = image_folder({"a": 3}, "set/test", shade=100).parent
    data = load(f"imagefolder:{root}", val=0.2)
    assert {name: len(stored(s)) for name, s in data.splits.items()} == {
        "train": 16,
        "val": 4,
        "test": 3,
    }
    assert data.classes == ("a", "b")
    assert stored(data.test).labels.tolist() == [0, 0, 0]
    x, _ = stored(data.test)[0]
    assert isinstance(x, torch.Tensor)
    assert int(x[0, 0, 5]) >= 100


def test_the_name_valid_means_validation(image_folder: Folder) -> None:
    image_folder({"a": 4}, "set/train")
    root = image_folder({"a": 2}, "set/valid", shade=90).parent
    assert len(stored(load(f"imagefolder:{root}").val)) == 2


def test_a_class_may_be_called_train(image_folder: Folder) -> None:
    data = load(f"imagefolder:{image_folder({'train': 3, 'bus': 3})}")
    assert data.classes == ("bus", "train")


def test_split_folders_without_classes_are_refused(image_folder: Folder) -> None:
    root = image_folder({"train": 3, "test": 3})
    with pytest.raises(DataError, match=r"holds no class folders .3 images lie directly"):
        load(f"imagefolder:{root}")


def test_image_size_keeps_the_centred_square(
    image_folder: Folder, encoded: Callable[..., bytes]
) -> None:
    root = image_folder({"a": 3, "b": 3})
    (root / "a" / "big.jpg").write_bytes(encoded(7, (90, 40), "JPEG"))
    data = load(f"imagefolder:{root}", image_size=4, val=0, test=0)
    assert data.input_shape == (3, 4, 4)
    x, _ = stored(data.train)[3]
    assert isinstance(x, torch.Tensor)
    # The bright column is left of the centred square.
    assert x.max() < 20


def test_several_sizes_ask_for_image_size(
    image_folder: Folder, encoded: Callable[..., bytes]
) -> None:
    root = image_folder({"a": 3})
    (root / "a" / "wide.png").write_bytes(encoded(1, (20, 8)))
    with pytest.raises(DataError, match=r"12x8.*20x8.*Give image_size"):
        load(f"imagefolder:{root}")


def test_unreadable_images_are_counted_and_named(image_folder: Folder) -> None:
    root = image_folder({"a": 3, "b": 3})
    (root / "a" / "torn.jpg").write_bytes(b"no image")
    whole = (root / "b" / "000.png").read_bytes()
    (root / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2 of 8 images cannot be read.*torn\.jpg.*cut\.png"):
        load(f"imagefolder:{root}")


def test_empty_classes_are_named(image_folder: Folder) -> None:
    root = image_folder({"a": 3, "b": 0, "c": 0})
    (root / "b" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"2 of 3 class folders .* hold no image: b, c;"):
        load(f"imagefolder:{root}")


def test_classes_unknown_to_training_are_refused(image_folder: Folder) -> None:
    image_folder({"horse": 2}, "set/train")
    root = image_folder({"hoarse": 2}, "set/val").parent
    with pytest.raises(DataError, match=r"hoarse in val .* Close matches: horse"):
        load(f"imagefolder:{root}")


def test_two_names_of_one_split_are_refused(image_folder: Folder) -> None:
    image_folder({"a": 2}, "set/val")
    root = image_folder({"a": 2}, "set/valid").parent
    with pytest.raises(DataError, match="found both val and valid"):
        load(f"imagefolder:{root}")


def test_loose_images_are_counted(image_folder: Folder) -> None:
    root = image_folder({"a": 2}) / "a"
    with pytest.raises(DataError, match="2 images lie directly in it"):
        load(f"imagefolder:{root}")


def test_a_phone_photo_is_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "set" / "a").mkdir(parents=True)
    image = Image.new("RGB", (12, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "set" / "a" / "0.jpg", exif=exif)
    assert load(f"imagefolder:{tmp_path / 'set'}").input_shape == (3, 12, 8)
