"""RCM: components of responses, what is put back, lengths of rows, and folding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.errors import DataError, PlanError
from weft.patches.modulated import bank_key, basis_key


def net(*, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=2, dilation=2, bias=True),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, groups=5, bias=False),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()
    base(images(9))  # statistics of their own
    with torch.no_grad():
        base[1].weight.uniform_(0.5, 2)
        base[1].bias.uniform_(-1, 1)
    return base.eval()


def images(seed: int, rows: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 9, 9, generator=generator, dtype=torch.float64) + 0.7


def model_of(base: nn.Module, **options: Any) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, weft.rcm(base, **options), example=images(0, 2))
    model.add_task("t", weft.Classification(3))
    return model.eval()


def test_without_responses_a_new_task_is_the_base_bit_for_bit() -> None:
    base = net()
    assert torch.equal(model_of(base).view("t")(images(1)), base(images(1)))


@pytest.mark.parametrize("rank", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_a_loaded_task_is_the_stored_one_bit_for_bit(
    rank: float, seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 17), nn.Tanh())
    x = torch.randn(16, 9)
    model = weft.MultiTaskModel(base, weft.rcm(base, responses=[x], rank=rank), example=x)
    model.add_task("t", weft.Classification(3))
    bank = weft.Bank(tmp_path)
    bank.save(model)
    assert torch.equal(bank.load(base).eval()(x, task="t"), model.eval()(x, task="t"))
    created = [part.value for part in model.sharing.created.values()]
    assert all(tensor.is_contiguous() for tensor in created)


@pytest.mark.parametrize("normalise", [True, False])
def test_at_full_rank_response_initialisation_is_the_base(normalise: bool) -> None:
    base = net()
    model = model_of(base, responses=[images(1), images(2)], normalise=normalise)
    torch.testing.assert_close(model.view("t")(images(3)), base(images(3)), rtol=0, atol=1e-10)


def test_components_are_those_of_numpy() -> None:
    base, batch = net(), images(1)
    plan = weft.rcm(base, responses=[batch[:7], (batch[7:], torch.zeros(9))], rank=0.5)
    with torch.no_grad():
        y = base[0](batch).movedim(1, -1).flatten(0, -2).numpy()
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    expected = vectors[:, np.argsort(-values)[:3]]
    found = plan.created[basis_key("0.weight")].value.numpy()
    np.testing.assert_allclose(np.abs(np.sum(found * expected, axis=0)), np.ones(3), atol=1e-8)
    np.testing.assert_allclose(
        plan.created[bank_key("0.weight")].value.flatten(1).numpy(),
        found.T @ base[0].weight.detach().flatten(1).numpy(),
    )
    assert not any(c.trains for c in plan.created.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0.34, 0.67])
def test_what_truncation_leaves_out_is_put_back_with_the_right_sign(
    bias: bool, rank: float
) -> None:
    """Before training, normalisation reads U U^T y + m - U U^T m."""
    base, batch = net(bias=bias), images(1)
    model = model_of(base, responses=[batch], rank=rank)
    folded = model.fold("t").eval()
    with torch.no_grad():
        y = base[0](batch)
        u = model.shared[basis_key("0.weight")]
        mean = y.mean((0, 2, 3))
        projected = torch.einsum("ij,njhw->nihw", u @ u.T, y)
        kept = projected + (mean - u @ (u.T @ mean))[:, None, None]
        expected = base[1](kept)
        torch.testing.assert_close(folded[1](folded[0](batch)), expected, rtol=0, atol=1e-6)
        # With the sign of the authors' code the mean of the responses is not kept.
        torch.testing.assert_close(kept.mean((0, 2, 3)), mean)
        # A layer with a bias takes it there.
        inner = base[2](folded[1](folded[0](batch)))
        assert folded[3].weight.shape == base[3].weight.shape
        assert folded[3](inner).shape == base[3](inner).shape


def test_a_layer_with_a_bias_takes_it_there() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 5)).double()
    x = torch.randn(40, 9, dtype=torch.float64) + 1.0
    model = weft.MultiTaskModel(base, weft.rcm(base, responses=[x], rank=0.4), example=x[:1])
    model.add_task("t", weft.Classification(2))
    with torch.no_grad():
        y = base(x)
        u = model.shared[basis_key("0.weight")]
        mean = y.mean(0)
        expected = (y - mean) @ u @ u.T + mean
        torch.testing.assert_close(model.eval().view("t")(x), expected, rtol=0, atol=1e-6)


def disturbed(**options: Any) -> tuple[weft.MultiTaskModel, nn.Module]:
    base = net()
    model = model_of(base, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in model.tasks["t"].own.values():
            if tensor.is_floating_point() and tensor.dim():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model, base


@pytest.mark.parametrize("options", [{}, {"responses": [images(1)], "rank": 0.5}])
def test_it_is_a_filter_bank_and_a_1x1_convolution_of_its_outputs(options: Any) -> None:
    model, base = disturbed(**options)
    own, first = model.tasks["t"].own, base[0]
    rank = 3 if options else 6
    basis = model.shared[basis_key("0.weight")] if options else torch.eye(6).double()
    bank = model.shared[bank_key("0.weight")] if options else first.weight
    rows = basis + own["0.weight:modulator"]
    length = basis.norm(dim=1) * own["0.weight:gain"]
    modulator = rows / rows.norm(dim=1, keepdim=True) * length[:, None]
    assert modulator.shape == (6, rank)
    with torch.no_grad():
        features = F.conv2d(images(2), bank, stride=first.stride, padding=first.padding)
        expected = F.conv2d(features, modulator[:, :, None, None])
        folded = model.fold("t")
        torch.testing.assert_close(folded[0](images(2)), expected)
        weight = model.tensors("t")["0.weight"]
        torch.testing.assert_close(weight.flatten(1), modulator @ bank.flatten(1))


def test_rows_keep_their_lengths_while_directions_train() -> None:
    model, _ = disturbed()
    own = model.tasks["t"].own
    with torch.no_grad():
        own["0.weight:gain"].fill_(2.0)
        own["0.weight:modulator"].add_(torch.randn(6, 6, dtype=torch.float64))
        bank = model.base[0].weight.flatten(1)
        modulator = model.tensors("t")["0.weight"].flatten(1) @ torch.linalg.pinv(bank)
    torch.testing.assert_close(modulator.norm(dim=1), torch.full((6,), 2.0, dtype=torch.float64))


def test_layers_for_which_a_modulator_is_no_smaller_are_owned() -> None:
    plan = weft.rcm(net())
    kinds = {name: type(patch).__name__ for name, patch in plan.patches.items()}
    assert kinds["0.weight"] == kinds["3.weight"] == kinds["10.weight"] == "Modulated"
    assert kinds["5.weight"] == kinds["7.weight"] == kinds["3.bias"] == "Replace"
    assert kinds["1.running_mean"] == "Replace"


def test_adding_and_training_tasks_changes_no_other_by_a_bit() -> None:
    base = net()
    model = model_of(base, responses=[images(1)], rank=0.67)
    before = model.view("t")(images(4)).detach()
    statistics = {n: t.clone() for n, t in base.state_dict().items()}
    model.add_task("u", weft.Classification(2))
    y = torch.arange(16) % 2
    weft.fit(model, {"u": [(images(5), y)]}, epochs=3, lr=0.1, progress=False)
    assert torch.equal(model.eval().view("t")(images(4)), before)
    assert all(torch.equal(t, statistics[n]) for n, t in base.state_dict().items())
    assert not torch.equal(model.view("u")(images(4)), before)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rank": 0.0}, PlanError, r"number in \(0, 1\]"),
        ({"rank": 1.5}, PlanError, r"number in \(0, 1\]"),
        ({"rank": 0.5}, PlanError, "responses=batches"),
        ({"rank": 0.5, "responses": []}, DataError, "at least one batch"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        weft.rcm(net(), **options)


# --------------------------------------------------------------- who reads a layer's responses


class Skipping(nn.BatchNorm2d):
    """A normalisation that adds what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Wired(nn.Module):
    """Two convolutions and two normalisations, wired in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.c, self.d = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(3, 6, 3, bias=False)
        self.n, self.m = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.other, self.hooked = Skipping(6), nn.BatchNorm2d(6)
        self.hooked.register_forward_hook(lambda _, x, y: y + x[0])
        if way == "also read by a scripted module":
            self.scripted = torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        match self.way:
            case "plain":
                return self.n(y)
            case "a relu in between, in place":
                return self.n(self.act(y))
            case "one normalisation for two layers":
                return self.n(y) + self.n(self.d(x))
            case "one normalisation for a layer and for something else":
                return self.n(y) + self.n(self.d(x) + 1)
            case "one layer for two normalisations":
                return self.n(y) + self.m(self.c(2 * x))
            case "also read by a skip":
                return self.n(y) + y
            case "also read by an operation in place":
                return self.n(y) + y.relu_()
            case "also written into another tensor":
                z = torch.zeros_like(x[:, :1]).repeat(1, 6, 1, 1)[..., 2:, 2:]
                z[:] = y
                return self.n(y) + z
            case "also read as a list":
                return self.n(y) + torch.tensor(y.tolist(), dtype=y.dtype)
            case "also read by a scripted module":
                return self.n(y) + self.scripted(y)
            case "normalised by a class of another library":
                return self.other(y)
            case "normalised with a hook":
                return self.hooked(y)
            case "normalised by a keyword":
                return self.n(input=y)
            case _:
                return torch.cat([self.n(y), y])


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w)


WAYS = (
    "a relu in between, in place",
    "one normalisation for two layers",
    "one normalisation for a layer and for something else",
    "one layer for two normalisations",
    "also read by a skip",
    "also read by an operation in place",
    "also written into another tensor",
    "also read as a list",
    "also read by a scripted module",
    "normalised by a class of another library",
    "normalised with a hook",
    "returned as well",
)


@pytest.mark.parametrize("way", ["plain", "normalised by a keyword", *WAYS])
def test_b_goes_only_where_it_keeps_the_mean_of_what_the_network_answers(way: str) -> None:
    """Where no normalisation alone reads a layer, the task owns the layer, and it is the base's."""
    base, x = Wired(way).double(), images(1)
    base(x)
    base.eval()
    model = model_of(base, responses=[x], rank=0.34)
    with torch.no_grad():
        expected, found = base(x), model.view("t")(x)
    torch.testing.assert_close(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert (basis_key("c.weight") in model.shared) == (way not in WAYS)
    assert torch.allclose(found, expected) == (way in WAYS)


def test_layers_that_change_their_weights_are_owned_whole() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Standardised(3, 6, 3, bias=False), nn.BatchNorm2d(6)).double().eval()
    plan = weft.rcm(base, responses=[images(1)], rank=0.5)
    assert not plan.created
    assert type(plan.patches["0.weight"]).__name__ == "Replace"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(torch.cat([x, y], 1))


def test_inputs_of_several_tensors_are_spread_out() -> None:
    base, x, y = TwoInputs(), torch.randn(20, 3), torch.randn(20, 3)
    pairs = weft.rcm(base, rank=0.4, responses=[((x, y), torch.zeros(20))])
    named = weft.rcm(base, rank=0.4, responses=[{"x": x, "y": y}])
    key = basis_key("layer.weight")
    assert torch.equal(pairs.created[key].value, named.created[key].value)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (images(1), r"found one tensor. Give it as responses=\[x\]"),
        ([images(1) * float("nan")], "layer '0' answers with values that are no finite numbers"),
        ([images(1, rows=0)], "layer '0' answers with no rows"),
    ],
)
def test_responses_that_say_nothing_are_refused(batches: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        weft.rcm(net(), responses=batches, rank=0.5)
