"""Named arrays in .npz files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from weft.data import ArrayData, load
from weft.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]
Write = Callable[[Arrays], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(arrays: Arrays) -> str:
        np.savez(tmp_path / "set.npz", **arrays)  # type: ignore[arg-type]
        return f"npz:{tmp_path / 'set.npz'}"

    return save


def stored(split: object) -> ArrayData:
    assert isinstance(split, ArrayData)
    return split


def images(data: ArrayData) -> torch.Tensor:
    assert isinstance(data.inputs, torch.Tensor)
    return data.inputs[data.rows]


def grey(rows: int, start: int = 0) -> npt.NDArray[np.uint8]:
    return np.arange(start, start + rows * 16, dtype=np.uint8).reshape(rows, 4, 4)


def packed(encoded: Callable[..., bytes], shades: list[int]) -> Arrays:
    parts = [encoded(shade, (16, 16), "JPEG") for shade in shades]
    return {
        "jpg": np.frombuffer(b"".join(parts), np.uint8),
        "off": np.cumsum([0, *map(len, parts)]).astype(np.int64),
    }


def test_fixed_splits_are_kept(write: Write) -> None:
    spec = write(
        {
            "x_train": grey(6), "y_train": np.array([0, 1, 2] * 2),
            "x_val": grey(3, 96), "y_val": np.array([2, 1, 0]),
            "x_test": grey(1, 144), "y_test": np.array([1]),
            "classes": np.array(["a", "b", "c"]),
        }
    )  # fmt: skip
    data = load(spec)
    assert data.classes == ("a", "b", "c")
    assert data.input_shape == (1, 4, 4)
    assert images(stored(data.train)).squeeze(1).numpy().tolist() == grey(6).tolist()
    assert stored(data.val).labels.tolist() == [2, 1, 0]
    assert images(stored(data.test))[0, 0].numpy().tolist() == grey(1, 144)[0].tolist()


def test_arrays_without_splits_are_split(write: Write) -> None:
    data = load(write({"x": np.random.randn(40, 5), "y": np.arange(40) % 2}), val=0.25, test=0.25)
    assert [len(stored(s)) for s in data.splits.values()] == [20, 10, 10]
    assert data.classes == ("0", "1")
    assert images(stored(data.train)).dtype == torch.float32


def test_jpeg_packed_images_are_decoded(write: Write, encoded: Callable[..., bytes]) -> None:
    arrays: Arrays = {"y_train": np.array([0, 1, 0]), "y_test": np.array([1])}
    for split, shades in (("train", [10, 100, 20]), ("test", [200])):
        arrays |= {f"{k}_{split}": v for k, v in packed(encoded, shades).items()}
    data = load(write(arrays), val=0)
    assert data.input_shape == (3, 16, 16)
    shades = images(stored(data.train))[:, 0, 8, 12].tolist()
    assert np.allclose(shades, [10, 100, 20], atol=3)
    assert abs(int(images(stored(data.test))[0, 0, 8, 12]) - 200) <= 3
    assert load(write(arrays), val=0, image_size=8).input_shape == (3, 8, 8)


def test_damaged_packed_images_are_named(write: Write, encoded: Callable[..., bytes]) -> None:
    arrays = packed(encoded, [1, 2, 3]) | {"y": np.zeros(3, np.int64)}
    arrays["jpg"] = arrays["jpg"].copy()
    arrays["jpg"][arrays["off"][1] : arrays["off"][2]] = 0
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read: jpg\[1\]"):
        load(write(arrays))
    arrays["off"][2] = 0
    with pytest.raises(DataError, match="must hold rising offsets"):
        load(write(arrays))


def test_another_target_can_be_chosen(write: Write) -> None:
    arrays: Arrays = {"y_digit": np.array([3, 1]), "y_speaker": np.array(["eve", "bob"])}
    spec = write({"x": grey(2), **arrays})
    speaker = load(spec + "#target=y_speaker", val=0, test=0)
    assert speaker.classes == ("bob", "eve")
    assert stored(speaker.train).labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"found 2 targets: y_digit, y_speaker; .*Add #target"):
        load(spec)
    with pytest.raises(DataError, match=r"found target=y_digits; .*Close matches: y_digit"):
        load(spec + "#target=y_digits")


def test_class_names_belong_to_the_default_target(write: Write) -> None:
    names = np.array(["zero", "one"])
    spec = write({"x": grey(2), "y": np.array([0, 1]), "task": np.array([1, 0]), "classes": names})
    assert load(spec).classes == ("zero", "one")
    assert load(spec + "#target=task").classes == ("0", "1")
    assert load(spec + "#target=task&classes=classes").classes == ("zero", "one")
    assert load(spec + "#classes=none").classes == ("0", "1")


def test_labels_beyond_the_class_names_are_refused(write: Write) -> None:
    spec = write({"x": grey(2), "y": np.array([0, 5]), "classes": np.array(["a", "b"])})
    with pytest.raises(DataError, match=r"y holds label 5, and classes names 2 .*classes=none"):
        load(spec)
    assert len(load(spec + "#classes=none").classes or ()) == 6


def test_rows_of_one_task_can_be_chosen(write: Write) -> None:
    spec = write(
        {
            "x_train": grey(4), "y_train": np.array([0, 1, 2, 3]),
            "task_train": np.array([7, 8, 7, 8]),
            "x_test": grey(2, 64), "y_test": np.array([0, 1]), "task_test": np.array([8, 7]),
        }
    )  # fmt: skip
    data = load(spec + "#where=task:7", val=0)
    assert stored(data.train).labels.tolist() == [0, 2]
    assert images(stored(data.train)).squeeze(1).numpy().tolist() == grey(4)[[0, 2]].tolist()
    assert stored(data.test).labels.tolist() == [1]
    with pytest.raises(DataError, match="no row has where=task:9; task holds: 7, 8"):
        load(spec + "#where=task:9")
    with pytest.raises(DataError, match=r"found where=tusk:7; .*Close matches: task_train"):
        load(spec + "#where=tusk:7")


def test_tables_are_encoded_by_their_training_rows(write: Write) -> None:
    spec = write(
        {
            "x_num_train": np.array([[1.0], [3.0]]), "x_cat_train": np.array([[4], [9]]),
            "x_num_val": np.array([[5.0]]), "x_cat_val": np.array([[6]]),
            "y_train": np.array([0.5, 1.5]), "y_val": np.array([2.5]),
        }
    )  # fmt: skip
    data = load(spec)
    assert data.classes is None
    assert images(stored(data.train)).tolist() == [[-1, 1, 0], [1, 0, 1]]
    # 5 lies three deviations above the training mean, and category 6 was never trained on.
    assert images(stored(data.val)).tolist() == [[3, 0, 0]]


def test_kind_overrides_what_numbers_mean(write: Write) -> None:
    spec = write({"x": grey(3), "y": np.array([0, 2, 1])})
    regression = load(spec + "#kind=number", val=0, test=0)
    assert regression.classes is None
    assert stored(regression.train).labels.dtype == torch.float32
    with pytest.raises(DataError, match=r"found kind=class; .*Close matches: classes"):
        load(spec + "#kind=class")
    floats = write({"x": grey(2), "y": np.array([0.5, 1.0])})
    with pytest.raises(DataError, match="y holds fractions"):
        load(floats + "#kind=classes")


def test_several_labels_a_row_are_numbers(write: Write) -> None:
    spec = write({"x": grey(2), "y": np.array([[0, 1, 1], [1, 0, 0]])})
    data = load(spec, val=0, test=0)
    assert data.classes is None
    labels = stored(data.train).labels
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[0, 1, 1], [1, 0, 0]]


def test_channels_last_images_and_dense_targets(write: Write) -> None:
    x = np.random.default_rng(0).integers(0, 255, (5, 6, 8, 3), dtype=np.uint8)
    spec = write({"x": x, "seg": np.arange(5 * 48).reshape(5, 6, 8) % 4})
    data = load(spec, val=0, test=0)
    assert data.input_shape == (3, 6, 8)
    assert images(stored(data.train)).numpy().tolist() == x.transpose(0, 3, 1, 2).tolist()
    assert stored(data.train).labels.shape == (5, 6, 8)
    with pytest.raises(DataError, match="Dense targets are not resized"):
        load(spec, image_size=4)


def test_unknown_pixels_are_no_class(write: Write) -> None:
    x = np.zeros((5, 6, 8, 3), dtype=np.uint8)
    maps = (np.arange(5 * 48).reshape(5, 6, 8) % 4).astype(np.uint8)
    maps[:, 0] = 255
    assert load(write({"x": x, "seg": maps}), val=0, test=0).classes == ("0", "1", "2", "3")
    wide = maps.astype(np.int64) * 2
    assert len(load(write({"x": x, "seg": wide}), val=0, test=0).classes or ()) == 511
    empty = np.full_like(maps, 255)
    assert load(write({"x": x, "seg": empty}), val=0, test=0).classes == ()


def test_image_size_resizes_plain_images(write: Write) -> None:
    x = np.zeros((2, 8, 8), np.uint8)
    x[:, :, 4:] = 200
    data = load(write({"x": x, "y": np.array([0, 1])}), image_size=2, val=0, test=0)
    pixels = images(stored(data.train))
    assert pixels.shape == (2, 1, 2, 2)
    assert (pixels[..., 0] < 40).all()
    assert (pixels[..., 1] > 160).all()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": grey(2), "y": np.zeros(2)}, "found arrays images, y; expected inputs named x"),
        ({"x": grey(2), "y": np.zeros(3)}, r"found \[2\] rows of x and \[3\] targets y"),
        ({"x_train": grey(2), "y_train": np.zeros(2), "x_val": grey(1)}, "without y_val"),
        ({"x": grey(2), "y": np.array([0, -1])}, "y holds -1; expected class indices >= 0"),
        ({"x": np.array(["a b", "c"]), "y": np.zeros(2)}, "Texts need a tokenizer"),
        ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "found no samples"),
        ({"x_train": grey(2), "y_train": np.zeros(2), "x_val": np.zeros((1, 5)),
          "y_val": np.zeros(1)}, "the same shape in every split"),
        ({"x": grey(2), "y": np.array([1j, 2j])}, "y has type complex128"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(write: Write, arrays: Arrays, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(write(arrays))


def test_nothing_is_unpickled(write: Write, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    spec = write({"x": grey(1), "y": np.array([Trap()], dtype=object)})
    with pytest.raises(DataError, match="without pickled objects"):
        load(spec)
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_refused(write: Write, tmp_path: Path) -> None:
    spec = write({"x": grey(200), "y": np.zeros(200)})
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(whole[:300])
    with pytest.raises(DataError, match="cannot be read"):
        load(spec)
    np.save(tmp_path / "one.npy", grey(1))
    with pytest.raises(DataError, match="found a single array"):
        load(f"npz:{tmp_path / 'one.npy'}")
