"""Adapter folders of PEFT: what we write PEFT runs alike, and what PEFT wrote we run alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.errors import BankError, PlanError, TaskError
from weft.peft_format import load_peft, save_peft

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    """Every kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(x).tanh()
        x = self.norm(self.grouped(self.conv(x.transpose(1, 2)))).mean(2)
        y: Tensor = self.fc(x)
        return y


LAYERS = ["embed", "mix", "conv", "fc.0", "fc.2"]


def ids() -> Tensor:
    return torch.randint(0, 11, (4, 5))


def disturbed(module: nn.Module) -> nn.Module:
    """The module with its trainable tensors away from their start."""
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.requires_grad:
                tensor += 0.3 * torch.randn_like(tensor)
    return module.eval()


def of_peft(base: nn.Module, **options: Any) -> nn.Module:
    """A model of PEFT over a copy of the base."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS, **options})
    return disturbed(peft.get_peft_model(copy.deepcopy(base), config))


def of_weft(base: nn.Module, **options: Any) -> weft.MultiTaskModel:
    """A model with one task of low rank that is not at its start."""
    model = weft.MultiTaskModel(base, weft.lora(base, **{"r": 4, "alpha": 6.0, **options}))
    model.add_task("a", PASS)
    with torch.no_grad():
        for tensor in model.trainable("a").values():
            tensor += 0.3 * torch.randn_like(tensor)
    return model.eval()


def empty(base: nn.Module) -> weft.MultiTaskModel:
    """A model without tasks."""
    return weft.MultiTaskModel(base, weft.linear_probe(base)).eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- from PEFT


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.1, "target_modules": ["embed", "conv", "fc.0"]},
        {"rank_pattern": {"fc.0": 2, "embed": 3}, "alpha_pattern": {"mix": 3, r"fc\.\d": 1}},
        {"target_modules": r".*(conv|fc\.2)", "init_lora_weights": "gaussian"},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["0", "embed"], "exclude_modules": ["embed"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_what_peft_saved_gives_the_same_outputs(options: dict[str, Any], tmp_path: Path) -> None:
    base = Net().eval()
    expected = of_peft(base, **options)
    if "modules_to_save" in options:
        expected.train()(ids())  # its statistics move
        expected.eval()
    expected.save_pretrained(tmp_path)
    model = empty(base)
    before = copy.deepcopy(base.state_dict())
    load_peft(model, "a", tmp_path, PASS)
    x = ids()
    with torch.no_grad():
        assert_close(model(x, task="a"), expected(x))
        assert_close(model.fold("a")(x), expected(x))
        assert not torch.allclose(expected(x), base(x), atol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    plan = model.plan("a")
    assert plan.options["rslora"] == options.get("use_rslora", False)
    assert plan.options["dropout"] == options.get("lora_dropout", 0.0)
    # What is stored as a whole has a plan like any other: it can be made again, saved and loaded.
    again = weft.lora(base, **plan.options)
    assert dict(again.adapters) == dict(plan.adapters)
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model)
    with torch.no_grad():
        assert torch.equal(bank.load(base).eval()(x, task="a"), model(x, task="a"))


def test_a_loaded_task_trains_on_and_goes_back(tmp_path: Path) -> None:
    base = Net().eval()
    of_peft(base, modules_to_save=["norm"], rank_pattern={"conv": 2}).save_pretrained(
        tmp_path / "1"
    )
    model = empty(base)
    load_peft(model, "a", tmp_path / "1", PASS)
    model.train()
    optimizer = torch.optim.SGD(model.task_parameters("a"), lr=0.1)
    model(ids(), task="a").square().sum().backward()
    optimizer.step()
    save_peft(model.eval(), "a", tmp_path / "2")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "2").eval()
    x = ids()
    with torch.no_grad():
        assert_close(again(x), model(x, task="a"))
    one, two = (load_file(tmp_path / n / TENSORS) for n in "12")
    assert one.keys() == two.keys()
    assert all(one[k].shape == two[k].shape for k in one)


def test_tasks_of_one_kind_share_a_plan_and_mix(tmp_path: Path) -> None:
    base = Net().eval()
    layers = ["embed", "conv", "fc.0", "fc.2"]
    model = empty(base)
    for name in "abc":
        of_peft(base, target_modules=layers).save_pretrained(tmp_path / name)
        load_peft(model, name, tmp_path / name, PASS)
    assert model.plan("a") is model.plan("b") is model.plan("c")
    x = ids()
    with torch.no_grad():
        mixed = model(x, task=["a", "b", "c", "b"])
        for i, name in enumerate("abcb"):
            alone = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
            assert_close(mixed[i], alone(x)[i])


def test_a_base_inside_of_pefts(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.classifier = net, nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.classifier(self.net(ids))
            return y

    base = Net().eval()
    whole = of_peft(
        Classifier(base),
        target_modules=r"net\.(conv|fc\.0)",
        modules_to_save=["classifier"],
        rank_pattern={"net.conv": 2},
        alpha_pattern={r"^net\.fc\.0": 3},
    )
    whole.save_pretrained(tmp_path / "1")
    with pytest.raises(PlanError, match=r"'net.*', which is no module.*prefix="):
        load_peft(empty(base), "a", tmp_path / "1", PASS, leave=["classifier"])
    with pytest.raises(PlanError, match=r"'classifier.* which is not inside of 'net'.*leave="):
        load_peft(empty(base), "a", tmp_path / "1", PASS, prefix="net")
    model = empty(base)
    load_peft(model, "a", tmp_path / "1", PASS, prefix="net", leave=["classifier"])
    x = ids()
    with torch.no_grad():
        classify = whole.base_model.model.classifier
        assert_close(classify(model(x, task="a")), whole(x))
        save_peft(model, "a", tmp_path / "2", prefix="net")
        plain = Classifier(base)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "2").eval()
        assert_close(again(x), plain.classifier(model(x, task="a")))


# ------------------------------------------------------------------------------------ to PEFT


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "r": 3},
        {"target": ["fc.0"], "dropout": 0.1},
        {"rank_pattern": {"conv": 2, "grouped": 3}, "alpha_pattern": {r"fc\.0": 1.5}},
        {"target": ["embed", "grouped", "mix"], "init": "gaussian"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_what_we_saved_gives_the_same_outputs_in_peft(
    options: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = Net().eval()
    model = of_weft(base, **options)
    assert save_peft(model, "a", tmp_path, base_name="some/base") == tmp_path
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not [w for w in recwarn if "missing" in str(w.message)]
    x = ids()
    with torch.no_grad():
        assert_close(found(x), model(x, task="a"))
    back = empty(base)
    load_peft(back, "a", tmp_path, PASS)
    with torch.no_grad():
        assert torch.allclose(back(x, task="a"), model(x, task="a"), rtol=1e-6, atol=1e-6)
    for key, tensor in model.tasks["a"].own.items():
        assert torch.equal(back.tasks["a"].own[key], tensor)


def test_transformers_gpt2_goes_to_peft_and_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    base = transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval()
    plan = weft.lora(base, r=4, target=["c_attn", "c_proj", "wte"])
    assert len(plan.adapters) == 7
    model = weft.MultiTaskModel(base, plan, output="last_hidden_state").eval()
    model.add_task("a", PASS)
    for tensor in model.trainable("a").values():
        nn.init.normal_(tensor, std=0.2)
    save_peft(model, "a", tmp_path)
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        x = ids()
        assert_close(found(input_ids=x).last_hidden_state, model(x, task="a"))
        assert_close(model.fold("a")(x).last_hidden_state, model(x, task="a"))
        merged = found.merge_and_unload()
        assert_close(merged(input_ids=x).last_hidden_state, model(x, task="a"))


def test_names_that_end_alike_reach_the_right_layers(tmp_path: Path) -> None:
    base = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
    )
    model = of_weft(base, target=r"[02]", rank_pattern={"^0": 2})
    save_peft(model, "a", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == "0|2"
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(3, 4)
    assert_close(found(x), model(x, task="a"))
    assert len(load_file(tmp_path / TENSORS)) == 4


class Twice(nn.Module):
    """Names that end alike, of which PEFT's ``modules_to_save`` always means all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.prenorm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)})
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["fc"](self.inner["norm"](self.prenorm(self.norm(x))))
        y: Tensor = self.fc(x)
        return y


def owning(base: nn.Module, module: str, target: list[str]) -> weft.MultiTaskModel:
    """A model with a task that owns a module and low rank elsewhere."""
    everything = weft.full_finetune(base).patches
    owned = {name: p for name, p in everything.items() if name.startswith(f"{module}.")}
    adapters = weft.lora(base, r=2, target=target).adapters
    model = weft.MultiTaskModel(base, weft.Sharing("mine", patches=owned, adapters=adapters))
    model.add_task("a", PASS)
    with torch.no_grad():
        for tensor in model.trainable("a").values():
            tensor += 0.3 * torch.randn_like(tensor)
    return model.eval()


def test_whole_modules_whose_names_end_alike_reach_the_right_ones(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base, x = Twice().eval(), torch.randn(3, 4)
    model = owning(base, "norm", ["fc"])
    save_peft(model, "a", tmp_path)
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert_close(found(x), model(x, task="a"))
    back = empty(base)
    load_peft(back, "a", tmp_path, PASS)
    assert_close(back(x, task="a"), model(x, task="a"))


def test_a_layer_whose_name_ends_as_a_whole_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'inner.fc' is adapted, and 'fc' is owned as a whole"):
        save_peft(owning(Twice(), "fc", ["inner.fc"]), "a", tmp_path)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (nn.Conv1d(4, 4, 3, dilation=2), "'0': PEFT runs its branch without the layer's dilation"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "the layer pads 'circular'"),
        (nn.ConvTranspose1d(4, 4, 3), "'0': PEFT has no low rank for ConvTranspose1d"),
        (nn.GRU(4, 4), r"'0.weight_ih_l0': PEFT has no low rank for GRU"),
        (nn.MultiheadAttention(4, 2), r"'0.in_proj_weight': PEFT counts .* twice"),
    ],
)
def test_layers_that_peft_computes_otherwise_are_refused(
    layer: nn.Module, error: str, tmp_path: Path
) -> None:
    model = of_weft(nn.Sequential(layer))
    with pytest.raises(PlanError, match=error):
        save_peft(model, "a", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_task_that_is_tied_to_a_mean_leaves_it_behind(tmp_path: Path) -> None:
    base = Net()
    model = weft.MultiTaskModel(base, weft.bora(base, tau=2.0, r=4))
    model.add_task("a", PASS)
    with torch.no_grad():
        for tensor in (*model.tasks["a"].own.values(), *model.shared.values()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_peft(model, "a", tmp_path)
    again = weft.MultiTaskModel(base, weft.linear_probe(base))
    load_peft(again, "a", tmp_path, PASS)
    for key, tensor in model.tasks["a"].own.items():
        assert torch.equal(again.tasks["a"].own[key], tensor)
    # A plan that charges is none of PEFT's, though what it owns is the same.
    model.add_task("given", PASS, sharing=weft.bora(base, tau=2.0, r=4, mean="given"))
    load_peft(model, "plain", tmp_path, PASS)
    assert not model.plan("plain").penalties


def test_tasks_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    base = Net()
    for plan, error in (
        (weft.linear_probe(base), "owns no low rank"),
        (weft.taps(base), "no form for GatedTuned"),
        (weft.full_finetune(base), "owns no low rank"),
        (weft.hard_sharing(base), "trains tensors that tasks share and run with"),
        (weft.bora(base, joined=True), "trains tensors that tasks share and run with"),
        (weft.paco(base), "no form for Mixture"),
        (weft.scale_bias(base, where="layers"), "no form for ChannelAffine"),
    ):
        model = weft.MultiTaskModel(base, plan)
        model.add_task("a", PASS)
        with pytest.raises(PlanError, match=error):
            save_peft(model, "a", tmp_path)
    with pytest.raises(TaskError, match="no task 'b'"):
        save_peft(model, "b", tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_dora": True}, "use_dora=True has no form here"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "'pissa' may have changed the weights of the base"),
        ({"peft_type": "IA3"}, "the kind 'IA3'"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\]"),
        ({"r": 5}, "has rank 4, its configuration says 5"),
        ({"r": None}, "is damaged"),
        ({"rank_pattern": {"(": 2}}, "is damaged"),
    ],
)
def test_what_has_no_form_here_is_refused(change: Any, error: str, tmp_path: Path) -> None:
    base = Net().eval()
    of_peft(base, target_modules=["fc.0"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    model = empty(base)
    with pytest.raises((PlanError, BankError), match=error):
        load_peft(model, "a", tmp_path, PASS)
    assert not model.task_names


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    base = Net().eval()
    model = empty(base)
    with pytest.raises(BankError, match=r"adapter_config.json cannot be read"):
        load_peft(model, "a", tmp_path, PASS)
    of_peft(base, modules_to_save=["norm"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    with pytest.raises(PlanError, match=r"leave: 'nrm' is not among.*Close matches: norm"):
        load_peft(model, "a", tmp_path, PASS, leave=["nrm"])
    start = "base_model.model."
    wrong = {
        "is no module of the base.*Close matches: conv": (f"{start}cnov.lora_A.weight", (4, 8, 3)),
        "lacks 'fc.0.lora_B.weight'": (f"{start}fc.0.lora_B.weight", None),
        r"shape \(7, 4\), the base asks for \(6, 4\)": (f"{start}fc.0.lora_B.weight", (7, 4)),
        r"shape \(9,\), the base asks for \(8,\)": (f"{start}norm.weight", (9,)),
        "holds 'fc.0.lora_magnitude_vector'": (f"{start}fc.0.lora_magnitude_vector", (6,)),
    }
    for error, (name, shape) in wrong.items():
        changed = {k: v for k, v in tensors.items() if k != name}
        if shape is not None:
            changed[name] = torch.zeros(shape)
        save_file(changed, tmp_path / TENSORS)
        with pytest.raises((PlanError, BankError), match=error):
            load_peft(model, "a", tmp_path, PASS)
    (tmp_path / TENSORS).write_bytes(b"nothing")
    with pytest.raises(BankError, match="is damaged"):
        load_peft(model, "a", tmp_path, PASS)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(BankError, match="is no JSON"):
        load_peft(model, "a", tmp_path, PASS)
    assert not model.task_names


def test_attention_of_peft_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    of_peft(base, target_modules=["0"]).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="'0' cannot be adapted here: PEFT counts the low rank"):
        load_peft(empty(base), "a", tmp_path, PASS)


def test_a_grouped_branch_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    base = Net().eval()
    of_peft(base, target_modules=["grouped"]).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="'grouped' cannot be adapted here: its branch mixes"):
        load_peft(empty(base), "a", tmp_path, PASS)
