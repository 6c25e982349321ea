"""One task at several input sizes: a patch for each, heads shared or not, resized batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.cascade import Resized, add_resolutions
from weft.data import ArrayData, Preprocessing, loader
from weft.errors import DataError, TaskError
from weft.tasks import PooledLinear
from weft.training.loaders import reseed, share_of_process, slice_loader


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def classifier() -> nn.Sequential:
    """A base that ends in logits."""
    return nn.Sequential(trunk(), PooledLinear(4, 3))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 8, 8), torch.randint(0, 3, (6,))) for _ in range(count)]


def test_each_size_is_a_task_with_a_patch_and_a_head_of_its_own() -> None:
    base = trunk()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=torch.zeros(1, 3, 8, 8))
    stages = add_resolutions(model, "t", weft.Classification(3), sizes=(6, 8))
    assert stages == [("t@6", 6), ("t@8", 8)]
    assert model.task_names == ("t@6", "t@8")
    owned = [set(map(id, model.task_parameters(task))) for task, _ in stages]
    assert len(owned[0]) == len(owned[1]) == 4
    assert not owned[0] & owned[1]


def test_each_size_trains_its_own_patch_and_statistics() -> None:
    base = trunk()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=torch.zeros(1, 3, 8, 8))
    stages = add_resolutions(model, "t", weft.Classification(3), sizes=(6, 8))
    train = batches()
    weft.fit(model, {task: Resized(train, size) for task, size in stages}, epochs=1, lr=0.1,
             progress=False)  # fmt: skip
    small, large = (model.tasks[task].own for task, _ in stages)
    for key in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert not torch.equal(small[key], large[key]), key
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in model.base.state_dict().items())


def test_a_shared_head_is_the_bases_and_its_gradient_is_the_sum_over_sizes() -> None:
    base = classifier()
    model = weft.MultiTaskModel(base, weft.scale_bias(base, train_base=True))
    stages = add_resolutions(model, "t", weft.Classification(3), (6, 8), shared_head=True)
    assert all(model.head(task) is None for task, _ in stages)
    weight = model.shared_trainable()["1.linear.weight"]
    x, y = batches(1)[0]
    sized = dict(zip((t for t, _ in stages), (x[..., 1:7, 1:7], x), strict=True))

    def gradient(*tasks: str) -> Tensor:
        outputs = model.step({t: sized[t] for t in tasks}).outputs
        return torch.autograd.grad(sum(F.cross_entropy(outputs[t], y) for t in tasks), weight)[0]

    assert torch.allclose(gradient("t@6", "t@8"), gradient("t@6") + gradient("t@8"), atol=1e-6)


def test_tasks_on_a_shared_head_train_score_and_come_back_from_a_bank(tmp_path: Path) -> None:
    base = classifier()
    model = weft.MultiTaskModel(base, weft.scale_bias(base, train_base=True))
    stages = add_resolutions(model, "t", weft.Classification(3), (6, 8), shared_head=True)
    train = batches()
    data = {task: (Resized(train, size), Resized(train, size)) for task, size in stages}
    weft.fit(model, data, epochs=1, lr=0.1, progress=False)
    weft.Bank(tmp_path).save(model)
    loaded = weft.Bank(tmp_path).load(base)
    test = {task: Resized(train, size) for task, size in stages}
    assert weft.evaluate(loaded, test) == weft.evaluate(model, test)


def test_resized_batches_are_those_of_preprocessing_in_that_size() -> None:
    images = torch.randint(0, 256, (10, 3, 12, 16), dtype=torch.uint8)
    data = ArrayData(images, torch.arange(10))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    full = loader(data, 4, train=False, preprocessing=Preprocessing(mean, std))
    small = loader(data, 4, train=False, preprocessing=Preprocessing(mean, std, image_size=5))
    found = list(Resized(full, 5))
    assert len(found) == len(Resized(full, 5)) == 3
    for (x, y), (x_small, y_small) in zip(found, small, strict=True):
        assert torch.allclose(x, x_small, atol=1e-5)
        assert torch.equal(y, y_small)


def test_resizing_to_the_same_size_changes_no_bit() -> None:
    train = batches()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(Resized(train, 8), train, strict=True))


def test_a_shuffled_loader_shuffles_anew_in_each_epoch() -> None:
    data = TensorDataset(torch.randn(32, 3, 4, 4), torch.arange(32))
    small = Resized(DataLoader(data, 8, shuffle=True), 2)
    first, second = (torch.cat([y for _, y in small]) for _ in range(2))
    assert first.sort().values.equal(torch.arange(32))
    assert not torch.equal(first, second)


def test_parts_and_seeds_reach_the_loader_inside() -> None:
    data = TensorDataset(torch.randn(32, 3, 4, 4), torch.arange(32))
    inner = DataLoader(data, 8, shuffle=True, generator=torch.Generator())
    small = Resized(inner, 2)
    orders = []
    for _ in range(2):
        reseed(small, 5)
        orders.append(torch.cat([y for _, y in small]))
    assert torch.equal(*orders)
    parts = [slice_loader(small, part, 1, "a") for part in ((0.0, 0.5), (0.5, 1.0))]
    first, second = (torch.cat([y for _, y in part]).tolist() for part in parts)
    assert sorted(first + second) == list(range(32))
    shares = [share_of_process(small, index, 2, "a") for index in (0, 1)]
    assert {tuple(x.shape) for share in shares for x, _ in share} == {(4, 3, 2, 2)}


def test_a_loader_without_length_has_none_resized() -> None:
    with pytest.raises(TypeError, match=r"no len\(\)"):
        len(Resized(iter(batches()), 4))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(DataError, match=r"floats N x C x H x W, found torch.float32 of shape \(2"):
        list(Resized([(torch.zeros(2, 5), torch.zeros(2))], 4))


@pytest.mark.parametrize("sizes", [(), (8, 6), (6, 6), (0, 6)])
def test_sizes_that_do_not_ascend_are_refused(sizes: tuple[int, ...]) -> None:
    base = trunk()
    model = weft.MultiTaskModel(base, weft.scale_bias(base))
    with pytest.raises(TaskError, match="sizes ascend and are at least 1"):
        add_resolutions(model, "t", weft.Classification(3), sizes)


def test_a_taken_name_adds_none_of_the_tasks() -> None:
    base = trunk()
    model = weft.MultiTaskModel(base, weft.scale_bias(base))
    model.add_task("t@8", weft.Classification(3))
    with pytest.raises(TaskError, match="'t@8' exists already"):
        add_resolutions(model, "t", weft.Classification(3), (6, 8))
    assert model.task_names == ("t@8",)
