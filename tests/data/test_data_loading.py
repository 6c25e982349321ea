"""Loaders and transforms."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from weft.data import ArrayData, Augmentation, Preprocessing, loader
from weft.errors import DataError


def photos(rows: int = 10, height: int = 6, width: int = 8) -> ArrayData:
    pixels = torch.randint(0, 256, (rows, 3, height, width), dtype=torch.uint8)
    return ArrayData(pixels, torch.arange(rows))


def pixels(data: ArrayData) -> torch.Tensor:
    assert isinstance(data.inputs, torch.Tensor)
    return data.inputs


def test_evaluation_keeps_order_and_scales_pixels() -> None:
    data = photos()
    batches = list(loader(data, 4, train=False))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    x = torch.cat([x for x, _ in batches if isinstance(x, torch.Tensor)])
    assert x.dtype == torch.float32
    assert torch.equal(x, pixels(data) / 255)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_reseeding_repeats_an_epoch(workers: int) -> None:
    everything = Augmentation(True, 2, 0.5, 0.3, 0.3)
    batches = loader(photos(), 5, train=True, augmentation=everything, workers=workers)

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in batches if isinstance(x, torch.Tensor)])

    first = epoch(0)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))


def test_training_sees_every_row_once_and_may_drop_the_rest() -> None:
    seen = torch.cat([y for _, y in loader(photos(50), 4, train=True)]).tolist()
    assert sorted(seen) == list(range(50))
    assert seen != list(range(50))
    assert len(list(loader(photos(), 4, train=True, drop_last=True))) == 2


@pytest.mark.parametrize("wrap", ["subset", "concat", "tensors"])
def test_other_data_sets_give_the_same_batches(wrap: str) -> None:
    data = photos(6)
    wrapped: dict[str, Dataset[object]] = {
        "subset": Subset(data, [0, 1, 2, 3, 4, 5]),  # type: ignore[dict-item]
        "concat": ConcatDataset([data]),  # type: ignore[dict-item]
        "tensors": TensorDataset(pixels(data), data.targets),  # type: ignore[dict-item]
    }
    for (x, y), (expected, labels) in zip(
        loader(wrapped[wrap], 4, train=False), loader(data, 4, train=False), strict=True
    ):
        assert torch.equal(x, expected)  # type: ignore[arg-type]
        assert torch.equal(y, labels)


def test_the_data_set_also_serves_a_plain_torch_loader() -> None:
    data = photos(4)
    x, y = next(iter(DataLoader(data, batch_size=4)))
    assert torch.equal(x, pixels(data))
    assert y.tolist() == [0, 1, 2, 3]


def test_types_that_a_network_takes() -> None:
    tokens = {
        "input_ids": torch.arange(6, dtype=torch.int32).view(3, 2),
        "w": torch.ones(3).double(),
    }
    x, y = next(iter(loader(ArrayData(tokens, torch.rand(3).double()), 3, train=False)))
    assert isinstance(x, dict)
    assert (x["input_ids"].dtype, x["w"].dtype) == (torch.int64, torch.float32)
    assert y.dtype == torch.float32


def test_preprocessing_normalises_each_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    out = Preprocessing((0.0, 0.5, 1.0), (1.0, 0.5, 2.0))(images)
    assert out.squeeze().tolist() == [[0, 1], [-1, 1], [-0.5, 0]]


def test_grey_images_are_repeated_and_sizes_fitted() -> None:
    grey = torch.randint(0, 256, (2, 1, 6, 10), dtype=torch.uint8)
    out = Preprocessing.symmetric(12)(grey)
    assert out.shape == (2, 3, 12, 12)
    assert torch.equal(out[:, 0], out[:, 2])
    # The centred square alone is used: what lies beside it has no influence.
    beside = grey.clone()
    beside[..., :2] = 0
    beside[..., 8:] = 255
    assert torch.equal(Preprocessing.symmetric(12)(beside), out)


@pytest.mark.parametrize("preset", [Preprocessing.imagenet(), Preprocessing.symmetric()])
def test_floats_are_taken_as_zero_to_one(preset: Preprocessing) -> None:
    images = pixels(photos(2))
    assert torch.allclose(preset(images), preset(images.float() / 255))


def test_a_flip_mirrors_about_half_of_the_images_and_their_dense_targets() -> None:
    images = pixels(photos(200))
    dense = images[:, 0].long()
    out, targets = Augmentation(flip=True)(images, dense)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 60 < int(mirrored.sum()) < 140
    assert torch.equal(targets, out[:, 0].long())


def test_a_flip_turns_normals_round() -> None:
    images = pixels(photos(50))
    normals = torch.randn(50, 3, *images.shape[2:])
    out, floats = Augmentation(normals=True)(images, normals)
    mirrored = (out != images).flatten(1).any(1)
    expected = normals.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert 0 < int(mirrored.sum()) < 50
    assert torch.equal(floats[mirrored], expected[mirrored])
    assert torch.equal(floats[~mirrored], normals[~mirrored])
    # As a picture: what is decoded by 2 x / 255 - 1 mirrors the same.
    picture = torch.randint(0, 256, normals.shape, dtype=torch.uint8)
    out, whole = Augmentation(normals=True)(images, picture)
    mirrored = (out != images).flatten(1).any(1)
    decoded, was = (2 * p.double() / 255 - 1 for p in (whole, picture))
    torch.testing.assert_close(decoded[mirrored][:, 0], -was[mirrored][:, 0].flip(-1))
    assert torch.equal(whole[mirrored][:, 1:], picture[mirrored][:, 1:].flip(-1))
    with pytest.raises(DataError, match="expected surface normals, N x 3 x H x W"):
        Augmentation(normals=True)(images, normals[:, :2])


def test_a_padded_crop_is_a_shift() -> None:
    images = torch.zeros(300, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 9
    out, _ = Augmentation(flip=False, crop_padding=1)(images, torch.zeros(300))
    places = torch.nonzero(out[:, 0] == 9)[:, 1:]
    assert len(places) == 300
    assert sorted({tuple(p) for p in places.tolist()}) == [
        (y, x) for y in (1, 2, 3) for x in (1, 2, 3)
    ]


def test_zoom_magnifies_within_the_image() -> None:
    ramp = torch.linspace(0, 1, 32).expand(100, 1, 32, 32)
    out, _ = Augmentation(flip=False, min_area=0.25)(ramp, torch.zeros(100))
    spread = out[:, 0, 0, -1] - out[:, 0, 0, 0]
    assert out.shape == ramp.shape
    assert 0.45 < float(spread.min()) < 0.65
    assert float(spread.max()) > 0.85
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


def test_light_changes_stay_in_bounds() -> None:
    images = torch.full((200, 3, 2, 2), 0.5)
    images[..., 0] = 0.25
    out, _ = Augmentation(flip=False, brightness=0.2, contrast=0.5)(images, torch.zeros(200))
    level = out.mean(dim=(1, 2, 3)) / 0.375
    stretch = (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / 0.25 / level
    for values, reach in ((level, 0.2), (stretch, 0.5)):
        assert float((values - 1).abs().max()) <= reach + 1e-5
        assert float(values.max() - values.min()) > reach


def test_no_augmentation_changes_nothing() -> None:
    images = pixels(photos())
    out, _ = Augmentation(flip=False)(images, torch.zeros(10))
    assert out is images


class Ragged(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(index + 1), index


def test_samples_of_several_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="Resize or pad them"):
        next(iter(loader(Ragged(), 2, train=False)))


def test_arguments_out_of_range_are_refused() -> None:
    data = photos(3)
    empty = ArrayData(torch.zeros(0, 1), torch.zeros(0))
    with pytest.raises(DataError, match="batch_size=0"):
        loader(data, 0, train=True)
    with pytest.raises(DataError, match="data set is empty"):
        loader(empty, 1, train=False)
    with pytest.raises(DataError, match=r"fewer than batch_size=4.*drop_last"):
        loader(data, 4, train=True, drop_last=True)
    with pytest.raises(DataError, match="augmentation was given with train=False"):
        loader(data, 2, train=False, augmentation=Augmentation())
    with pytest.raises(DataError, match="deviations above 0"):
        Preprocessing(mean=(0.5,), std=(0.0,))
    with pytest.raises(DataError, match="image_size=0"):
        Preprocessing(image_size=0)
    with pytest.raises(DataError, match="brightness=2"):
        Augmentation(brightness=2)
    with pytest.raises(DataError, match="min_area=0"):
        Augmentation(min_area=0)


def test_transforms_refuse_what_is_no_image() -> None:
    table = torch.zeros(4, 3)
    with pytest.raises(DataError, match=r"Preprocessing was given a .* shape \(4, 3\)"):
        Preprocessing()(table)
    with pytest.raises(DataError, match="Augmentation was given"):
        Augmentation()(table, torch.zeros(4))
    with pytest.raises(DataError, match="3 means and the images 4 channels"):
        Preprocessing.imagenet()(torch.zeros(1, 4, 2, 2))
    with pytest.raises(DataError, match="dense targets"):
        Augmentation(crop_padding=1)(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2))
    tokens = ArrayData({"ids": torch.zeros(2, 3)}, torch.zeros(2))
    with pytest.raises(DataError, match="given a dict of inputs"):
        next(iter(loader(tokens, 2, train=False, preprocessing=Preprocessing())))
