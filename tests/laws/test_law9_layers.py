"""Law 9: every kind of layer is patched correctly, or the method refuses the base by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weft
from laws.cases import NEEDS, REFUSED, Case, assert_close, disturb
from weft.core.sites import Kind, sites
from weft.errors import PlanError


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_base_that_lacks_what_the_method_owns_is_refused(case: Case) -> None:
    with pytest.raises(PlanError) as error:
        case.plan(case.base.make())
    assert str(error.value).startswith(case.method)
    assert NEEDS[case.method][1] in str(error.value)


class First(nn.Module):
    """The first output of a module that returns several."""

    def __init__(self, inner: nn.Module, *, thrice: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.thrice = thrice

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0] if self.thrice else self.inner(x)[0]


def image(*shape: int) -> Tensor:
    return torch.randn(3, *shape)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 7, (3, *shape))


MHA = nn.MultiheadAttention
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), image(4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2), image(4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2), image(2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), image(4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), image(4, 5, 5)),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), image(4, 5, 5)),
    "same": (lambda: nn.Conv1d(4, 4, 3, padding="same"), image(4, 9)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), image(4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), image(4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), image(2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 5), image(4)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), image(6, 4)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), ids(5)),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), ids(5)),
    "layernorm": (lambda: nn.LayerNorm((3, 4)), image(3, 4)),
    "rmsnorm": (lambda: nn.RMSNorm(4), image(4)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), image(4, 5)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(4), image(4)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4), image(4, 5, 5)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(2), image(2, 3, 3, 3)),
    "batchnorm without affine": (lambda: nn.BatchNorm2d(4, affine=False), image(4, 5, 5)),
    "batchnorm without statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        image(4, 5, 5),
    ),
    "instancenorm": (lambda: nn.InstanceNorm1d(4, affine=True), image(4, 5)),
    "attention": (lambda: First(MHA(8, 2, batch_first=True), thrice=True), image(5, 8)),
    "attention with extra keys": (
        lambda: First(MHA(8, 2, add_bias_kv=True, batch_first=True), thrice=True),
        image(5, 8),
    ),
    "attention of other widths": (
        lambda: First(MHA(8, 4, kdim=8, vdim=8, batch_first=True, bias=False), thrice=True),
        image(5, 8),
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True),
        image(5, 8),
    ),
    "rnn": (lambda: First(nn.RNN(4, 5, batch_first=True)), image(6, 4)),
    "lstm": (lambda: First(nn.LSTM(4, 5, num_layers=2, bidirectional=True)), image(6, 4)),
    "projected lstm": (lambda: First(nn.LSTM(4, 5, proj_size=3)), image(6, 4)),
    "gru": (lambda: First(nn.GRU(4, 5, bias=False)), image(6, 4)),
    "rnn cell": (lambda: nn.RNNCell(4, 5), image(4)),
    "lstm cell": (lambda: First(nn.LSTMCell(4, 5)), image(4)),
    "prelu": (lambda: nn.PReLU(4), image(4, 5)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), image(4)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), image(4)),
}
PASS_THROUGH = weft.Task(head=None, loss=nn.functional.mse_loss)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("method", ["full_finetune", "taps", "scale_bias", "bias_only"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_patched_layer_is_the_layer_with_the_tasks_tensors(layer: str, method: str) -> None:
    torch.manual_seed(1)
    make, x = LAYERS[layer]
    base = make().eval()
    if lacks(base, method):
        with pytest.raises(PlanError, match=f"^{method} "):
            weft.method(method, base)
        return
    plan = weft.method(method, base)
    model = weft.MultiTaskModel(base, plan).eval()
    model.add_task("a", PASS_THROUGH)
    disturb(model)
    assert model.trainable("a") or not list(base.parameters())

    with torch.no_grad():
        plain = copy.deepcopy(base)
        tensors = model.tensors("a")
        plain.load_state_dict(tensors, strict=True)
        expected = plain(x)
        assert_close(model(x, task="a"), expected, 1e-6)  # kernels may depend on alignment
        assert_close(model.fold("a")(x), expected, 1e-6)
        changed = [n for n, t in base.state_dict().items() if not torch.equal(t, tensors[n])]
        assert torch.equal(expected, base(x)) == (not changed)


def lacks(base: nn.Module, method: str) -> bool:
    """Whether the base has nothing that the method owns."""
    found = sites(base)
    return not {
        "full_finetune": True,
        "taps": any(s.kind in (Kind.LAYER, Kind.DEPTHWISE) and not s.refusal for s in found),
        "scale_bias": any(s.kind is Kind.NORM for s in found),
        "bias_only": any(s.biases for s in found),
    }[method]


KINDS = {
    Kind.LAYER: "conv1d grouped transposed2d linear attention rnn lstm",
    Kind.DEPTHWISE: "depthwise",
    Kind.NORM: "layernorm rmsnorm groupnorm batchnorm1d instancenorm prelu",
    Kind.EMBEDDING: "embedding",
}


@pytest.mark.parametrize(
    ("layer", "kind"), [(layer, kind) for kind, layers in KINDS.items() for layer in layers.split()]
)
def test_layers_are_of_their_kind(layer: str, kind: Kind) -> None:
    assert sites(LAYERS[layer][0]())[0].kind is kind


def test_taps_leaves_out_reparametrised_layers_with_the_reason() -> None:
    base = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
    plan = weft.taps(base)
    assert set(plan.refused) == {"0"}
    assert "reparametrised" in plan.refused["0"]
    assert set(plan.patches) == {"1.weight", "1.bias"}


def test_lazy_layers_are_refused_by_name() -> None:
    base = nn.Sequential(nn.LazyLinear(4))
    for use in (weft.taps, weft.full_finetune):
        with pytest.raises(PlanError, match=r"'0.weight' of the base has no shape yet. Run the"):
            use(base)


def test_a_spectral_norm_that_trains_never_moves_the_base() -> None:
    base = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    before = copy.deepcopy(base.state_dict())
    model = weft.MultiTaskModel(base, weft.scale_bias(base)).train()
    model.add_task("a", PASS_THROUGH)
    outputs = [model(torch.ones(5, 4), task="a") for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])  # each forward starts from the shared vectors
    for state in (base.state_dict(), model.base.state_dict()):
        assert all(torch.equal(state[k], v) for k, v in before.items())
