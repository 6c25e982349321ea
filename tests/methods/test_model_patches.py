"""Model patches: what is owned and inserted, fixed heads, a base that trains with all tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import weft
from weft.adapters import ChannelAffine
from weft.errors import ConfigError, PlanError
from weft.training.optimization import parameter_groups


def bare() -> nn.Sequential:
    """Convolutions, one of them depthwise, and a linear layer, without any normalisation."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def normalised() -> nn.Sequential:
    """A convolution with batch normalisation, a depthwise and a full one."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 1),
    )  # fmt: skip


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 8, 8)


def batches(rows: int = 8, count: int = 4, classes: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images whose class is written into their mean."""
    found = []
    for _ in range(count):
        y = torch.randint(0, classes, (rows,))
        found.append((images(rows) + 2.0 * y.view(-1, 1, 1, 1), y))
    return found


# ----------------------------------------------------------------- where scales and shifts are


def test_a_network_without_normalisation_gets_scales_and_shifts_behind_its_layers() -> None:
    plan = weft.scale_bias(bare())
    assert dict(plan.adapters) == dict.fromkeys(("0", "2", "5"), ChannelAffine())
    assert not plan.patches
    assert plan.only_owns
    assert plan.options["where"] == "layers"


def test_a_normalised_network_gets_none_unless_asked() -> None:
    assert not weft.scale_bias(normalised()).adapters
    assert weft.scale_bias(normalised()).options["where"] == "norms"
    assert set(weft.scale_bias(normalised(), where="layers").adapters) == {"0", "3", "6"}
    assert not weft.scale_bias(normalised(), where="layers").patches


def test_layer_and_group_normalisations_own_their_scale_and_shift() -> None:
    base = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 6), nn.LayerNorm(6)
    )
    plan = weft.scale_bias(base)
    assert set(plan.patches) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert not plan.adapters


def test_a_batch_normalisation_without_scale_gets_one_behind_it() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    plan = weft.scale_bias(base)
    assert set(plan.adapters) == {"1"}
    assert set(plan.patches) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_counts_of_a_vgg() -> None:
    # 2 numbers for each output channel of 8 convolutions and 3 linear layers.
    with torch.device("meta"):
        vgg = torchvision.models.vgg11(weights=None)
    model = weft.MultiTaskModel(vgg, weft.scale_bias(vgg))
    model.add_task("a", weft.Task(None, F.mse_loss))
    channels = 64 + 128 + 256 + 256 + 4 * 512 + 4096 + 4096 + 1000
    assert model.ledger("a").own_parameters == 2 * channels == 23_888


def test_depthwise_patch_inserts_what_scale_bias_inserts() -> None:
    both, alone = weft.depthwise_patch(bare()), weft.depthwise_patch(bare(), scale_bias=False)
    assert set(both.patches) == set(alone.patches) == {"2.weight"}
    assert dict(both.adapters) == dict(weft.scale_bias(bare()).adapters)
    assert not alone.adapters


class Tied(nn.Module):
    """An embedding whose weight is the output projection's, and attention in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.recur = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, 7)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x)[0]
        return self.out(self.recur(self.mix(x))[0])


def test_layers_that_cannot_get_a_scale_and_shift_are_named_with_the_reason() -> None:
    plan = weft.scale_bias(Tied())
    assert set(plan.adapters) == {"mix"}
    assert plan.refused == {
        "attention": "its output channels are not known",
        "attention.out_proj": "a part of another layer, which uses its tensors without calling it",
        "recur": "its output channels are not known",
        "out": "its weight is used elsewhere too, so a scale could not be folded into it",
    }
    model = weft.MultiTaskModel(Tied(), plan)
    model.add_task("a", weft.Task(None, F.mse_loss))
    assert model(torch.randint(0, 7, (2, 5)), task="a").shape == (2, 5, 7)


@pytest.mark.parametrize(
    ("base", "options", "complaint"),
    [
        (bare(), {"where": "everywhere"}, "None or 'norms' or 'layers', found 'everywhere'"),
        (bare(), {"where": "norms"}, "of normalisation layers, and this base has none. Try bias"),
        (nn.LSTM(3, 4), {}, "or adds them to convolutions and linear layers, and this base has"),
        (nn.Linear(3, 4), {}, "and this base has none"),
        (nn.MultiheadAttention(4, 2), {}, "and this base has none"),
        (nn.Sequential(nn.LayerNorm(4)), {"where": "layers"}, "and this base has none"),
    ],
)
def test_wrong_options_and_bases_are_refused(
    base: nn.Module, options: dict[str, str], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        weft.scale_bias(base, **options)


@pytest.mark.parametrize("train_base", [False, True])
def test_weight_decay_leaves_scales_and_shifts_alone_and_takes_the_rest(train_base: bool) -> None:
    base = bare()
    model = weft.MultiTaskModel(base, weft.depthwise_patch(base, train_base=train_base))
    model.add_task("a", weft.Task(None, F.mse_loss))
    groups = parameter_groups(model, ["a"], lr=0.1, weight_decay=0.5)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    own, shared = model.trainable("a"), model.shared_trainable()
    assert {k: decay[id(p)] for k, p in own.items()} == {
        k: 0.5 if k == "2.weight" else 0.0 for k in own
    }
    assert bool(shared) == train_base
    assert all(decay[id(p)] == 0.5 for k, p in shared.items() if k != "2.weight")


# ------------------------------------------------------------------------------- fixed heads


def fixed(base: nn.Module, plan: weft.Sharing) -> weft.MultiTaskModel:
    """A model with one task over a fixed random head."""
    model = weft.MultiTaskModel(base, plan, example=images(2))
    model.add_task("a", weft.Classification(2, head_trains=False))
    return model


@pytest.mark.parametrize("plan", [weft.scale_bias, weft.depthwise_patch])
@pytest.mark.parametrize("make", [bare, normalised])
def test_a_patch_learns_over_a_head_that_stays_at_its_random_start(plan, make) -> None:
    base = make()
    model = fixed(base, plan(base))
    before = {k: t.clone() for k, t in model.head("a").state_dict().items()}
    assert before["linear.weight"].any()
    data = batches()
    start = weft.evaluate(model, {"a": data})["a"]["loss"]
    weft.fit(model, {"a": data}, epochs=10, lr=1.0, weight_decay=0.01, progress=False)
    end = weft.evaluate(model, {"a": data})["a"]["loss"]
    after = model.head("a").state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert end < 0.8 * start
    own = {id(p) for p in model.trainable("a").values()}
    assert {id(p) for p in model.task_parameters("a")} == own


def test_a_fixed_head_comes_back_from_a_bank_bit_for_bit_and_fixed(tmp_path: Path) -> None:
    base = bare()
    model = fixed(base, weft.scale_bias(base))
    model.tasks["a"].own["0:scale"].data += 0.5
    weft.Bank(tmp_path).save(model)
    torch.manual_seed(99)
    loaded = weft.Bank(tmp_path).load(base)
    x = images()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x, task="a"), model.eval()(x, task="a"))
    assert not any(p.requires_grad for p in loaded.head("a").parameters())
    assert len(loaded.task_parameters("a")) == len(loaded.trainable("a")) > 0
    head = {k: t.clone() for k, t in loaded.head("a").state_dict().items()}
    weft.fit(loaded, {"a": batches()}, epochs=1, lr=0.05, progress=False)
    assert all(torch.equal(t, head[k]) for k, t in loaded.head("a").state_dict().items())


def test_a_fixed_head_counts_as_a_head() -> None:
    base = bare()
    ledger = fixed(base, weft.scale_bias(base)).ledger("a")
    assert ledger.head_parameters == 2 * 5 + 2


def test_a_fixed_head_of_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match="equal logits for ever"):
        weft.Classification(2, head_init="zero", head_trains=False)


# -------------------------------------------------------------------- a base that trains too


def joint(base: nn.Module, plan: weft.Sharing) -> weft.MultiTaskModel:
    """Two tasks on a base that trains with both."""
    model = weft.MultiTaskModel(base, plan, example=images(2))
    for name in "ab":
        model.add_task(name, weft.Classification(2))
    return model


@pytest.mark.parametrize(
    ("plan", "owned"),
    [
        (lambda b: weft.scale_bias(b, train_base=True), {"1", "4"}),
        (lambda b: weft.depthwise_patch(b, train_base=True), {"1", "3", "4"}),
        (lambda b: weft.depthwise_patch(b, scale_bias=False, train_base=True), {"3"}),
    ],
    ids=["scale_bias", "both", "depthwise"],
)
def test_everything_that_is_not_owned_trains_for_all(plan, owned: set[str]) -> None:
    base = normalised()
    sharing = plan(base)
    parameters = {n for n, _ in base.named_parameters()}
    statistics = {n for n, _ in base.named_buffers()}
    assert {n.split(".")[0] for n in sharing.patches if n in parameters} == owned
    assert statistics <= sharing.patches.keys()  # whatever else is owned
    assert sharing.train_shared == parameters - sharing.patches.keys()
    assert sharing.trains_shared


def test_a_joint_gradient_of_the_shared_weights_is_the_sum_over_tasks() -> None:
    base = normalised()
    model = joint(base, weft.scale_bias(base, train_base=True))
    x, y = {t: images() for t in "ab"}, {t: torch.randint(0, 2, (6,)) for t in "ab"}
    weights = model.shared_trainable()
    assert set(weights) == {"0.weight", "3.weight", "6.weight", "6.bias"}

    def gradients(*tasks: str) -> dict[str, Tensor]:
        outputs = model.step({t: x[t] for t in tasks}).outputs
        loss = sum(F.cross_entropy(outputs[t], y[t]) for t in tasks)
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    both, a, b = gradients("a", "b"), gradients("a"), gradients("b")
    for name in weights:
        assert a[name].any()
        assert b[name].any()
        assert torch.allclose(both[name], a[name] + b[name], atol=1e-6), name


def test_each_tasks_statistics_see_only_its_own_micro_batch() -> None:
    base = normalised()
    model = joint(base, weft.scale_bias(base, train_base=True)).train()
    x = {"a": images(), "b": 3.0 + 2.0 * images()}
    model.step(x)
    for task in "ab":
        first = base[0](x[task])
        own = model.tasks[task].own
        mean, var = first.mean((0, 2, 3)), first.var((0, 2, 3))
        assert torch.allclose(own["1.running_mean"], 0.1 * mean, atol=1e-6)
        assert torch.allclose(own["1.running_var"], 0.9 + 0.1 * var, atol=1e-5)
    assert not model.base[1].running_mean.any()
    assert not base[1].running_mean.any()


def test_fitting_together_trains_the_base_and_each_patch_and_refuses_a_part() -> None:
    base = normalised()
    model = joint(base, weft.scale_bias(base, train_base=True))
    users = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(PlanError, match="trains tensors that all tasks use"):
        weft.fit(model, {"a": batches()}, epochs=1, progress=False)
    start = {n: t.detach().clone() for n, t in model.shared_trainable().items()}
    data = {t: batches() for t in "ab"}
    weft.fit(model, data, epochs=2, lr=0.05, progress=False)
    assert all(not torch.equal(start[n], t) for n, t in model.shared_trainable().items())
    for key in ("1.weight", "1.running_mean"):
        a, b = (model.tasks[t].own[key] for t in "ab")
        assert not torch.equal(a, b)
        assert not torch.equal(a, users[key])
    assert all(torch.equal(users[n], t) for n, t in base.state_dict().items())


def test_a_joint_model_comes_back_from_a_bank_bit_for_bit(tmp_path: Path) -> None:
    base = bare()
    model = joint(base, weft.depthwise_patch(base, train_base=True))
    weft.fit(model, {t: batches() for t in "ab"}, epochs=1, lr=0.05, progress=False)
    weft.Bank(tmp_path).save(model)
    loaded = weft.Bank(tmp_path).load(base).eval()
    x = images()
    with torch.no_grad():
        for task in "ab":
            assert torch.equal(loaded(x, task=task), model.eval()(x, task=task))
