"""LoRA: which layers, with PEFT's meanings; where the weight itself is changed; its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import weft
from core.test_core_mixing import operations
from laws.bases import BASES
from laws.variants import LAWS, Variant, name_of, variants
from weft.adapters import LowRank
from weft.errors import PlanError
from weft.patches import LowRankSum

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)


class Block(nn.Module):
    """A block of a transformer with the names of one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.dense = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.dense(self.query(x) * self.value(x).tanh()))
        return y


class Net(nn.Module):
    """Tokens, two blocks, a convolution and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.dense = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.depthwise(self.conv(x.transpose(1, 2))).mean(2)
        y: Tensor = self.dense(x)
        return y


QUERIES = ["blocks.0.query", "blocks.1.query"]
DENSE = ["blocks.0.dense", "blocks.1.dense", "dense"]
LINEAR = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("query", "value", "dense")] + ["dense"]


@pytest.mark.parametrize(
    ("target", "exclude", "sites"),
    [
        (None, None, [*LINEAR[:-1], "conv", "dense"]),
        ("all-linear", None, LINEAR),
        ("ALL-linear", ["dense"], [s for s in LINEAR if s not in DENSE]),
        (["query"], None, QUERIES),
        (["dense"], None, DENSE),
        (["dense"], r"blocks\..*", ["dense"]),
        (["blocks.0.query", "conv"], None, ["blocks.0.query", "conv"]),
        (r"blocks\.1\.(query|value)", None, ["blocks.1.query", "blocks.1.value"]),
        (["embed", "depthwise"], None, ["embed", "depthwise"]),
        (None, ["conv", "dense"], [s for s in LINEAR if s not in DENSE]),
        (r".*\.0\..*", None, ["blocks.0.query", "blocks.0.value", "blocks.0.dense"]),
    ],
)
def test_targets_have_pefts_meanings(target: Any, exclude: Any, sites: list[str]) -> None:
    plan = weft.lora(Net(), target=target, exclude=exclude)
    assert list(plan.adapters) == sites
    assert not plan.patches
    assert all(one == LowRank() for one in plan.adapters.values())


def test_what_is_left_out_has_a_reason() -> None:
    assert dict(weft.lora(Net()).refused) == {
        "depthwise": "depthwise: low rank costs more than the layer; name it in target="
    }
    refused = weft.lora(Net(), target=["norm", "query"]).refused
    reason = "LayerNorm has no floating point weight matrix"
    assert dict(refused) == {"blocks.0.norm": reason, "blocks.1.norm": reason}
    base = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert "reparametrised" in weft.lora(base).refused["0"]
    tied = next(b for b in BASES if b.name == "tied").make()
    assert "tied" in weft.lora(tied).refused["out"]
    assert list(weft.lora(tied).adapters) == ["mix"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": ["querry"]}, r"no layer is called 'querry' or ends.*Close matches:.*query"),
        ({"target": "query"}, r"no layer's whole name matches.*target=\['query'\]"),
        ({"target": "(query"}, "is no regular expression"),
        ({"target": ["query"], "exclude": ["querry"]}, "exclude: no layer is called 'querry'"),
        ({"target": ["query"], "exclude": ["query"]}, "this base has none that is asked for"),
        ({"target": ["norm"]}, "can adapt no layer.*'blocks.0.norm': LayerNorm has no.*2 layers"),
        ({"r": 0}, "a rank of 1 or more, found 0"),
        ({"r": 2.0}, "a rank of 1 or more, found 2.0"),
        ({"alpha": 0}, "other than 0"),
        ({"dropout": 1.0}, r"in \[0, 1\), found 1.0"),
        ({"alpha": "x"}, r"lora\(alpha=...\) is a number other than 0, found 'x'"),
        ({"alpha": True}, "a number other than 0, found True"),
        ({"alpha": 10**400}, "a number other than 0"),
        ({"dropout": "x"}, r"lora\(dropout=...\) is a number in \[0, 1\), found 'x'"),
        ({"dropout": None}, r"in \[0, 1\), found None"),
        ({"target": 3}, r"lora\(target=...\) is names, a regular expression, .*, found 3"),
        ({"target": [3]}, r"lora\(target=...\) is names, .*, found \[3\]"),
        ({"exclude": 3}, r"lora\(exclude=...\) is names, a regular expression or None, found 3"),
        ({"exclude": 0}, r"lora\(exclude=...\) is names, .*, found 0"),
        ({"rslora": "yes"}, r"lora\(rslora=...\) is True or False, found 'yes'"),
        ({"init": "pissa"}, "'kaiming' or 'gaussian', found 'pissa'"),
        ({"rank_pattern": {"querry": 2}}, "rank_pattern: no adapted layer's name ends as 'querry'"),
        ({"rank_pattern": {"query": -1}}, "'query' has a rank of 1 or more, found -1"),
        ({"rank_pattern": {3: 2}}, r"rank_pattern=...\) has regular expressions as keys, found 3"),
        ({"rank_pattern": ["a"]}, r"rank_pattern=...\) is {regular expression: value}, found \["),
        ({"rank_pattern": 0}, r"rank_pattern=...\) is {regular expression: value}, found 0"),
        ({"alpha_pattern": {"query": None}}, "'query' has a number other than 0, found None"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern: .* is no regular expression"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], error: str) -> None:
    with pytest.raises(PlanError, match=error):
        weft.lora(Net(), **options)


def test_numbers_and_collections_of_other_kinds_are_taken() -> None:
    plan = weft.lora(Net(), alpha=np.float32(4), dropout=0, target={"query"}, exclude=("dense",))
    assert list(plan.adapters) == QUERIES


@pytest.mark.parametrize(
    ("kind", "sizes"), [("Linear", (0, 4)), ("Linear", (4, 0)), ("Embedding", (3, 0))]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_numbers_is_left_out(kind: str, sizes: tuple[int, int]) -> None:
    layer = getattr(nn, kind)(*sizes)
    base = nn.Sequential(nn.Linear(4, 4), layer)
    plan = weft.lora(base, target=["0", "1"])
    assert list(plan.adapters) == ["0"]
    shape = list(next(layer.parameters()).shape)
    assert plan.refused["1"] == f"its weight has the shape {shape}, so there is nothing to change"
    with pytest.raises(PlanError, match="nothing to change"):
        weft.lora(base, target=["1"])


def test_a_base_without_weights_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^lora adapts linear layers"):
        weft.lora(nn.Sequential(nn.BatchNorm1d(4)))


def test_ranks_and_numerators_follow_their_patterns() -> None:
    plan = weft.lora(
        Net(),
        r=4,
        alpha=8,
        rank_pattern={r"^blocks\.0\.query": 2, "query": 3, "conv": 1},
        alpha_pattern={r"blocks\.1\..*": 1.0},
    )
    found = {site: (one.r, one.alpha) for site, one in plan.adapters.items()}  # type: ignore[attr-defined]
    assert found["blocks.0.query"] == (2, 8)
    assert found["blocks.1.query"] == (3, 1.0)
    assert found["blocks.1.value"] == (4, 1.0)
    assert found["conv"] == (1, 8)
    assert found["dense"] == (4, 8)


# ------------------------------------------------------------------- weights that are read


READ = {
    "attention": ["attention.in_proj_weight", "attention.out_proj.weight"],
    "recurrent": [
        *(
            f"lstm.weight_{what}_l{layer}{direction}"
            for layer in (0, 1)
            for direction in ("", "_reverse")
            for what in ("ih", "hh")
        ),
        *("cell.weight_ih", "cell.weight_hh"),
    ],
    "encoder": [
        f"layers.{layer}.self_attn.{what}"
        for layer in (0, 1)
        for what in ("in_proj_weight", "out_proj.weight")
    ],
}
CALLED = {"encoder": [f"layers.{i}.linear{n}" for i in (0, 1) for n in (1, 2)]}


@pytest.mark.parametrize("base", READ)
def test_weights_that_are_read_are_changed_themselves(base: str) -> None:
    patched, inserted = READ[base], CALLED.get(base, [])
    chosen = next(b for b in BASES if b.name == base)
    net = chosen.make().eval()
    plan = weft.lora(net, r=3, alpha=6)
    assert list(plan.patches) == patched
    assert list(plan.adapters) == inserted
    assert set(plan.patches.values()) == {LowRankSum(3, 2.0)}
    model = weft.MultiTaskModel(net, plan).eval()
    model.add_task("a", PASS)
    for tensor in model.trainable("a").values():
        nn.init.normal_(tensor, std=0.3)
    plain, own = copy.deepcopy(net), model.tasks["a"].own
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            site = name.removesuffix(".weight")
            key = name if name in patched else site
            if name in patched or site in inserted:
                weight += 2.0 * own[f"{key}:B"] @ own[f"{key}:A"]
        x = chosen.inputs(3)
        assert torch.allclose(model(x, task="a"), plain(x), atol=1e-5)
        assert torch.allclose(model.fold("a")(x), plain(x), atol=1e-5)
    refused = [n.removesuffix(".weight").removesuffix(".in_proj_weight") for n in patched]
    if inserted:
        assert set(weft.lora(net, dropout=0.1).refused) == set(refused)


def test_attention_that_is_asked_for_brings_its_output_projection() -> None:
    net = next(b for b in BASES if b.name == "encoder").make()
    plan = weft.lora(net, target=["layers.0.self_attn"])
    names = ["in_proj_weight", "out_proj.weight"]
    assert list(plan.patches) == [f"layers.0.self_attn.{n}" for n in names]
    assert not weft.lora(net, exclude=["self_attn"]).patches
    assert list(weft.lora(net, target=["out_proj"]).patches) == [
        f"layers.{i}.self_attn.out_proj.weight" for i in (0, 1)
    ]


class Padded(nn.Conv2d):
    """A convolution that pads its input by itself, so that a branch beside it would miss that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


def test_a_layer_of_another_library_is_changed_in_its_weight() -> None:
    base = nn.Sequential(Padded(3, 4, 2), nn.Flatten(), nn.EmbeddingBag(2, 3))[:2]
    plan = weft.lora(base, r=2)
    assert dict(plan.patches) == {"0.weight": LowRankSum(2, 4.0)}
    model = weft.MultiTaskModel(base, plan).eval()
    model.add_task("a", PASS)
    for tensor in model.trainable("a").values():
        nn.init.normal_(tensor)
    own, plain = model.tasks["a"].own, copy.deepcopy(base)
    with torch.no_grad():
        plain[0].weight += 4.0 * (own["0.weight:B"] @ own["0.weight:A"]).view(4, 3, 2, 2)
        x = torch.randn(2, 3, 5, 5)
        assert torch.allclose(model(x, task="a"), plain(x), atol=1e-5)


# ------------------------------------------------------------------------------- the method


# A layer that has no more outputs, in each group, than numbers that make them, and inputs.
FULL: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 4), torch.randn(3, 6)),
    "convolution": (nn.Conv2d(3, 5, (2, 3), stride=2, dilation=2), torch.randn(2, 3, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(2, 4, 5, 5)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4), torch.randn(2, 4, 7)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2, stride=2), torch.randn(2, 4, 3, 3)),
    "grouped transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)),
    "embedding": (nn.Embedding(7, 4), torch.randint(0, 7, (3, 5))),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_rank_is_fine_tuning(kind: str) -> None:
    """Any weight that fine-tuning may find is W + B A: with B = 1, A is the difference itself."""
    layer, x = FULL[kind]
    base = nn.Sequential(copy.deepcopy(layer)).double()
    x = x.double() if x.is_floating_point() else x
    tuned = copy.deepcopy(base)
    nn.init.normal_(tuned[0].weight)
    outputs = base(x).shape[-1 if kind in ("linear", "embedding") else 1]
    plan = weft.lora(base, r=outputs, alpha=outputs, target=["0"])
    model = weft.MultiTaskModel(base, plan).eval()
    model.add_task("a", PASS)
    own = model.trainable("a")
    a, b = own["0:A"], own["0:B"]
    with torch.no_grad():
        change = tuned[0].weight - base[0].weight
        a.copy_(change.t() if kind == "embedding" else change)
        one = torch.eye(b.shape[1]).repeat(outputs // b.shape[1], 1)
        b.copy_(one.view(b.shape))
        assert torch.allclose(model.fold("a")[0].weight, tuned[0].weight)
        assert torch.allclose(model(x, task="a"), tuned(x))
        assert not torch.allclose(base(x), tuned(x), atol=1e-2)


def test_statistics_stay_those_of_the_base() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = weft.MultiTaskModel(base, weft.lora(base)).train()
    model.add_task("a", PASS)
    before = copy.deepcopy(base.state_dict())
    model(torch.randn(4, 3, 5, 5) + 3, task="a").sum().backward()
    assert all(torch.equal(before[k], v) for k, v in model.base.state_dict().items())
    assert set(model.tasks["a"].own) == {"0:A", "0:B"}


def test_training_on_a_task_of_low_rank_finds_it() -> None:
    base = nn.Sequential(nn.Linear(6, 6, bias=False))
    truth = base[0].weight.detach() + torch.outer(torch.randn(6), torch.randn(6)) / 3
    model = weft.MultiTaskModel(base, weft.lora(base, r=1, alpha=1))
    model.add_task("a", PASS)
    optimizer = torch.optim.Adam(model.task_parameters("a"), lr=0.03)
    x = torch.randn(64, 6)
    for _ in range(300):
        loss = (model(x, task="a") - x @ truth.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-5


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


MIXED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]] = {
    "convolutions": (convolutions, lambda rows: torch.randn(rows, 3, 8, 8), {}),
    "tokens": (
        lambda: nn.Sequential(Net().embed, Block(), nn.Flatten(), nn.Linear(40, 5)),
        lambda rows: torch.randint(0, 11, (rows, 5)),
        {"target": r"0|1\..*[eyu]|3"},
    ),
}
mixed = pytest.mark.parametrize("net", MIXED)


def with_tasks(net: str, count: int) -> tuple[weft.MultiTaskModel, Callable[[int], Tensor]]:
    """A model whose tasks all differ, and what makes inputs."""
    make, inputs, options = MIXED[net]
    base = make()
    model = weft.MultiTaskModel(base, weft.lora(base, r=4, **options), example=inputs(2)).eval()
    for i in range(count):
        model.add_task(f"t{i}", weft.Classification(3))
        for tensor in model.trainable(f"t{i}").values():
            nn.init.normal_(tensor, std=0.3)
    return model, inputs


@mixed
@torch.no_grad()
def test_one_forward_serves_any_number_of_tasks(net: str) -> None:
    counts = set()
    for tasks in (2, 8, 32, 128):
        model, inputs = with_tasks(net, tasks)
        x, rows = inputs(136), torch.arange(136) % tasks
        found = model(x, task=rows)
        counts.add(operations(lambda m=model, x=x, rows=rows: m(x, task=rows)))
        for row in (0, 1, 100, 135):
            alone = model(x[row : row + 1], task=int(rows[row]))[0]
            assert torch.allclose(found[row], alone, rtol=1e-5, atol=1e-5)
    assert len(counts) == 1


@mixed
@torch.no_grad()
def test_mixed_tasks_leave_as_one_program(net: str, tmp_path: Path) -> None:
    model, inputs = with_tasks(net, 3)
    path = weft.export(model, ["t0", "t1", "t2"], tmp_path / "mixed.pt2", format="torch")
    program = torch.export.load(path).module()
    for rows in (2, 7):
        x, task = inputs(rows), torch.arange(rows) % 3
        assert torch.allclose(program(x, task=task), model(x, task=task), atol=1e-5)


# Options that make other plans, on the bases that differ most.
OPTIONS: list[dict[str, Any]] = [
    {"dropout": 0.2, "rslora": True, "r": 2},
    {"target": r".*(conv|mix|embed|first|0|3|linear.|token).*", "init": "gaussian"},
]
ON = (("convolutions", "residual", "encoder", "custom"), ("convolutions", "transposed", "custom"))
CASES: list[Variant] = [
    v for options, names in zip(OPTIONS, ON, strict=True)
    for v in variants("lora", **options) if v.base.name in names
]  # fmt: skip


# What is dropped in a joint step is drawn in another order.
REPEATABLE = [law for law in LAWS if "joint_step" not in law.__name__]


@pytest.mark.parametrize("law", REPEATABLE, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_options_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)
