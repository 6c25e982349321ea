"""LowRank: y + scale * B(A(x)) at every kind of layer, against the changed weight itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weft
from core.test_core_mixing import operations
from weft.adapters import INSERTIONS, LowRank
from weft.adapters.low_rank_convolutions import LowRankConvolution
from weft.bank.plans import decode_plan, encode_plan
from weft.errors import PlanError

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)
R, SCALE = 3, 2.0 / 3


def image(*shape: int) -> Tensor:
    return torch.randn(7, *shape, dtype=torch.float64)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, (7, *shape))


Layers = dict[str, tuple[Callable[[], nn.Module], Tensor]]
LAYERS: Layers = {
    "linear": (lambda: nn.Linear(4, 6), image(4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), image(4)),
    "linear on sequences": (lambda: nn.Linear(4, 6), image(5, 4)),
    "linear on maps": (lambda: nn.Linear(4, 6), image(2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), image(4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(0, 1), bias=False), image(4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, stride=(1, 2, 1)), image(2, 3, 4, 3)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2), image(4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), image(4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), image(6, 5, 5)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=1), image(4, 7, 5)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), image(4, 5, 5)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), image(4, 5)),
    "replicate": (
        lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"),
        image(2, 3, 3, 3),
    ),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), image(4, 6, 7)),
    "same, circular": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
        image(4, 6),
    ),
    "valid": (lambda: nn.Conv1d(4, 6, 3, padding="valid"), image(4, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), image(4, 5)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), output_padding=(1, 2), bias=False),
        image(4, 3, 4),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), image(2, 3, 2, 3)),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, padding=1),
        image(4, 3, 4),
    ),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=2), ids(5)),
    "embedding of one token": (lambda: nn.Embedding(9, 6), ids()),
}  # fmt: skip
layers = pytest.mark.parametrize("layer", LAYERS)


def with_tasks(base: nn.Module, *tasks: str, **options: Any) -> weft.MultiTaskModel:
    """A model whose tasks adapt the layer "0"; nothing is at its start."""
    given = LowRank(**{"r": R, "alpha": 2.0, **options})
    model = weft.MultiTaskModel(base, weft.Sharing("lowrank", adapters={"0": given})).eval()
    for task in tasks or ("a",):
        model.add_task(task, PASS)
        for tensor in model.trainable(task).values():
            nn.init.normal_(tensor)
    return model


def changed(layer: Any, a: Tensor, b: Tensor, scale: float = SCALE) -> Tensor:
    """The oracle: the layer's weight with every number of B A added one group at a time."""
    weight = layer.weight.detach().clone()
    if isinstance(layer, nn.Embedding):
        return weight + scale * torch.einsum("rn,dr->nd", a, b)
    if isinstance(layer, nn.Linear):
        return weight + scale * torch.einsum("ri,or->oi", a, b)
    groups, rank = layer.groups, b.shape[1]
    inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
    b = b.flatten(1)
    for g in range(groups):
        for o in range(outputs):
            for i in range(inputs):
                for r in range(rank):
                    up = b[g * outputs + o, r]
                    if layer.transposed:
                        weight[g * inputs + i, o] += scale * up * a[g * inputs + i, r]
                    else:
                        weight[g * outputs + o, i] += scale * up * a[g * rank + r, i]
    return weight


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of the layer with another weight."""
    plain: Any = copy.deepcopy(layer)
    plain.weight = nn.Parameter(weight)
    return plain  # type: ignore[no-any-return]


@layers
def test_a_new_branch_is_nothing_bit_for_bit(layer: str) -> None:
    make, x = LAYERS[layer]
    base = nn.Sequential(make().float()).eval()
    x = x.float() if x.is_floating_point() else x
    model = weft.MultiTaskModel(base, weft.Sharing("lowrank", adapters={"0": LowRank()}))
    model.add_task("a", PASS)
    model.add_task("b", PASS)
    assert torch.equal(model.eval()(x, task="a"), base(x))
    assert torch.equal(model(x, task=[0, 1, 0, 1, 0, 1, 0]), base(x))
    own = model.trainable("a")
    zero, other = ("A", "B") if "embedding" in layer else ("B", "A")
    assert not own[f"0:{zero}"].any()
    assert own[f"0:{other}"].all()


@layers
def test_the_branch_is_the_changed_weight(layer: str) -> None:
    make, x = LAYERS[layer]
    base = nn.Sequential(make().double()).eval()
    before = copy.deepcopy(base.state_dict())
    model = with_tasks(base)
    own = model.trainable("a")
    weight = changed(base[0], own["0:A"].detach(), own["0:B"].detach())
    expected = with_weight(base[0], weight)(x)
    assert torch.allclose(model(x, task="a"), expected, rtol=1e-10, atol=1e-10)
    folded = model.fold("a")
    assert type(folded[0]) is type(base[0])
    assert torch.allclose(folded[0].weight, weight, rtol=1e-12, atol=1e-12)
    assert torch.allclose(folded(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, base(x), atol=1e-2)
    assert all(torch.equal(before[k], t) for k, t in base.state_dict().items())


@layers
def test_rows_of_different_tasks_are_those_of_their_tasks(layer: str) -> None:
    make, x = LAYERS[layer]
    model = with_tasks(nn.Sequential(make().double()), "a", "b", "c")
    names = ["c", "a", "b", "b", "c", "a", "c"]
    with torch.no_grad():
        mixed = model(x, task=names)
        for i, name in enumerate(names):
            alone = model(x[i : i + 1], task=name)[0]
            assert torch.allclose(mixed[i], alone, rtol=1e-10, atol=1e-10)


@layers
def test_operations_do_not_grow_with_the_number_of_tasks(layer: str) -> None:
    make, x = LAYERS[layer]
    x, counts = torch.cat([x, x]), set()
    for tasks in (2, 3, 7):
        model = with_tasks(nn.Sequential(make().double()), *"abcdefg"[:tasks])
        rows = torch.arange(14) % tasks
        with torch.no_grad():
            model(x, task=rows)
            counts.add(operations(lambda m=model, rows=rows: m(x, task=rows)))
    assert len(counts) == 1


@layers
def test_gradients_are_those_of_the_changed_weight(layer: str) -> None:
    make, x = LAYERS[layer]
    base = nn.Sequential(make().double())
    model = with_tasks(base, "a", "b").train()
    names = ["a", "b", "a", "b", "b", "b", "a"]
    mine = [i for i, name in enumerate(names) if name == "a"]
    own = model.trainable("a")
    if layer == "embedding":  # the padding's numbers start at zero and do not train
        own["0:A"].data[:, 2] = 0.0
    a, b = (own[f"0:{n}"].detach().clone().requires_grad_() for n in "AB")
    output = torch.func.functional_call(
        base[0], {"weight": differentiable(base[0], a, b)}, (x[mine],)
    )
    expected = torch.autograd.grad(output.sin().sum(), (a, b))
    wanted = [own["0:A"], own["0:B"]]
    alone = torch.autograd.grad(model(x[mine], task="a").sin().sum(), wanted)
    mixed = torch.autograd.grad(model(x, task=names)[mine].sin().sum(), wanted)
    for one, other, right in zip(alone, mixed, expected, strict=True):
        assert torch.allclose(one, right, rtol=1e-8, atol=1e-10)
        assert torch.allclose(other, right, rtol=1e-8, atol=1e-10)


def differentiable(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """`changed` as a differentiable sum; it is linear in A and in B."""
    rank, groups = b.shape[1], getattr(layer, "groups", 1)
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        delta = b @ a
        return layer.weight.detach() + SCALE * (delta.t() if "Emb" in str(layer) else delta)
    ups = b.flatten(1).chunk(groups)
    downs = a.chunk(groups)
    form = "ir...,or->io..." if layer.transposed else "ri...,or->oi..."
    assert downs[0].shape[1 if layer.transposed else 0] == rank
    delta = torch.cat([torch.einsum(form, d, u) for d, u in zip(downs, ups, strict=True)])
    return layer.weight.detach() + SCALE * delta


@pytest.mark.parametrize("layer", [n for n in LAYERS if "conv" in n or "same" in n or "lar" in n])
def test_rows_in_a_graph_are_computed_from_what_the_kernel_meets(layer: str) -> None:
    make, x = LAYERS[layer]
    model = with_tasks(nn.Sequential(make().double()), "a", "b", "c")
    view = model.mixed_view(example=x)
    rows = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    with torch.no_grad():
        expected = model(x, task=rows)
        program = torch.export.export(view, (x,), {"task": rows}).module()
        found = torch.compile(view, backend="eager", fullgraph=True)(x, task=rows)
        assert torch.allclose(program(x, task=rows), expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_dropout_drops_the_branchs_input_in_training_alone() -> None:
    base = nn.Sequential(nn.Linear(4, 6)).double()
    model = with_tasks(base, dropout=0.5)
    plain = with_tasks(base)
    plain.load_state_dict(model.state_dict())
    x = image(4)
    assert torch.equal(model(x, task="a"), plain(x, task="a"))
    model.train()
    torch.manual_seed(1)
    found = model(x, task="a")
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    own = model.trainable("a")
    expected = base(x) + SCALE * (dropped @ own["0:A"].t()) @ own["0:B"].t()
    assert torch.allclose(found, expected, rtol=1e-10)
    assert not torch.allclose(found, plain(x, task="a"))


def test_a_transposed_convolution_that_is_asked_for_a_size_gives_that_size() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x, output_size=(8, 8))
            return y

    base = Sized().double()
    model = weft.MultiTaskModel(base, weft.Sharing("lowrank", adapters={"up": LowRank(2)})).eval()
    model.add_task("a", PASS)
    for tensor in model.trainable("a").values():
        nn.init.normal_(tensor)
    x = image(4, 3, 3)
    assert model(x, task="a").shape == (7, 6, 8, 8)
    assert torch.allclose(model(x, task="a"), model.fold("a")(x), rtol=1e-10, atol=1e-10)


def test_channels_last_stays_channels_last() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 5, 6).to(memory_format=torch.channels_last)
    adapter = LowRank(3).build(layer)
    assert isinstance(adapter, LowRankConvolution)
    a, b = adapter.A, adapter.B
    each = a.expand(4, *a.shape), b.expand(4, *b.shape)
    for y in (adapter.added(layer(x), x, a, b), adapter.added_rows(layer(x), x, *each)):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_layer_is_kept(dtype: torch.dtype) -> None:
    model = with_tasks(nn.Sequential(nn.Linear(4, 6)).to(dtype))
    assert model.trainable("a")["0:A"].dtype is dtype
    assert model(torch.randn(2, 4, dtype=dtype), task="a").dtype is dtype


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_autocast_keeps_its_type(layer: str) -> None:
    make, x = LAYERS[layer]
    model = with_tasks(nn.Sequential(make()), "a", "b")
    with torch.autocast("cpu", torch.bfloat16):
        for task in ("a", [0, 1, 0, 1, 0, 1, 0]):
            assert model(x.float(), task=task).dtype is torch.bfloat16


def test_factors_in_half_precision_follow_the_layer() -> None:
    model = with_tasks(nn.Sequential(nn.Linear(4, 6)))
    own = model.tasks["a"].own
    for key in list(own):
        own[key] = nn.Parameter(own[key].detach().half())
    x = torch.randn(2, 4)
    assert model(x, task="a").dtype is torch.float32
    assert torch.allclose(model(x, task="a"), model.fold("a")(x), atol=1e-5)


def test_a_layer_used_twice_is_adapted_both_times() -> None:
    layer = nn.Linear(4, 4).double()
    base = nn.Sequential(layer, nn.Tanh(), layer)
    model = with_tasks(base)
    x = image(4)
    own = model.trainable("a")
    weight = changed(layer, own["0:A"].detach(), own["0:B"].detach())
    plain = with_weight(layer, weight)
    assert torch.allclose(model(x, task="a"), plain(plain(x).tanh()), rtol=1e-10)
    assert torch.allclose(model.fold("a")(x), plain(plain(x).tanh()), rtol=1e-10)


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (2.0, {"r": 4, "alpha": 8.0}),
        (4.0, {"r": 4, "alpha": 8.0, "rslora": True}),
        (1.0, {"r": 8, "alpha": 8.0}),
    ],
)
def test_the_factor_is_alpha_over_r_or_over_its_root(scale: float, options: Any) -> None:
    assert LowRank(**options).scale == scale
    base = nn.Sequential(nn.Conv1d(4, 6, 1)).double()
    model = with_tasks(base, **options)
    own = model.trainable("a")
    weight = changed(base[0], own["0:A"].detach(), own["0:B"].detach(), scale)
    x = image(4, 5)
    assert torch.allclose(model(x, task="a"), with_weight(base[0], weight)(x), rtol=1e-9)


@pytest.mark.parametrize(("r", "groups", "rank"), [(8, 1, 8), (8, 4, 2), (8, 3, 3), (2, 12, 1)])
def test_the_rank_of_a_grouped_convolution_is_shared_out(r: int, groups: int, rank: int) -> None:
    adapter = LowRank(r).build(nn.Conv2d(12, 24, 3, groups=groups))
    assert isinstance(adapter, LowRankConvolution)
    assert adapter.A.shape == (groups * rank, 12 // groups, 3, 3)
    assert adapter.B.shape == (24, rank, 1, 1)


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_a_start_is_repeated_by_its_seed(start: Any) -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        adapter = LowRank(4, start=start).build(nn.Linear(300, 5))
        starts.append(adapter.get_parameter("A").detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    if start == "kaiming":
        torch.manual_seed(1)
        nn.Linear(300, 5)
        right = nn.init.kaiming_uniform_(torch.empty(4, 300), a=5**0.5)
        assert torch.allclose(starts[0], right, rtol=1e-6)
    else:
        assert abs(float(starts[0].std()) - 0.25) < 0.02


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        return self._conv_forward(x, weight / weight.std(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 6), nn.Bilinear(4, 4, 6), nn.EmbeddingBag(4, 6), nn.LayerNorm(4),
        nn.Embedding(4, 6, max_norm=1.0), Standardised(3, 6, 3),
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.MultiheadAttention(4, 2),
    ],
)  # fmt: skip
def test_other_layers_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"found {type(layer).__name__}"):
        LowRank().build(layer)


def test_a_layer_that_is_called_by_keywords_is_refused_by_name() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    base = ByKeyword()
    model = weft.MultiTaskModel(base, weft.lora(base))
    model.add_task("a", PASS)
    with pytest.raises(PlanError, match="'layer' is called with keywords only"):
        model(torch.randn(2, 4), task="a")


def test_a_plan_comes_back_from_plain_values() -> None:
    plan = weft.Sharing("lowrank", adapters={"0": LowRank(4, 2.0, 0.1, True, "gaussian")})
    assert INSERTIONS["low_rank"] is LowRank
    assert dict(decode_plan(encode_plan(plan), {}).adapters) == dict(plan.adapters)
