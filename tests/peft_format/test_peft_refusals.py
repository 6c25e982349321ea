"""Adapter folders that are incomplete, damaged or crafted are refused by name."""

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
from weft.errors import BankError, ExportError, PlanError, TaskError
from weft.peft_format import load_peft, save_peft
from weft.peft_format.document import read_config
from weft.peft_format.rules import adapted, stored_by

peft = pytest.importorskip("peft", reason="PEFT is not installed")

get_peft_model_state_dict = pytest.importorskip("peft.utils").get_peft_model_state_dict

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
START = "base_model.model."


class Net(nn.Module):
    """Three layers to adapt and one to keep whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layers[1](self.layers[0](self.norm(self.first(x)).tanh())))
        return y


class Folder:
    """An adapter of PEFT over a net, to change and to load.

    Args:
        path: where it is.
        options: of PEFT's configuration.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.base = Net().eval()
        given = {"r": 3, "target_modules": ["first", "0"], "modules_to_save": ["norm"], **options}
        adapted = peft.get_peft_model(copy.deepcopy(self.base), peft.LoraConfig(**given))
        with torch.no_grad():
            for tensor in adapted.parameters():
                if tensor.requires_grad:
                    tensor += 0.3 * torch.randn_like(tensor)
        self.expected = adapted.eval()
        self.expected.save_pretrained(path)

    def configure(self, **changes: Any) -> None:
        """Change the configuration."""
        config = json.loads((self.path / CONFIG).read_text())
        (self.path / CONFIG).write_text(json.dumps({**config, **changes}))

    def drop(self, *starts: str) -> None:
        """Remove tensors by how their names start."""
        names = tuple(START + start for start in starts)
        kept = {k: v for k, v in self.tensors().items() if not k.startswith(names)}
        save_file(kept, self.path / TENSORS)

    def put(self, name: str, tensor: Tensor) -> None:
        """Add or replace a tensor."""
        save_file({**self.tensors(), START + name: tensor}, self.path / TENSORS)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        return load_file(self.path / TENSORS)

    def load(self, **options: Any) -> weft.MultiTaskModel:
        """A model with the adapter as its task."""
        model = weft.MultiTaskModel(self.base, weft.linear_probe(self.base)).eval()
        load_peft(model, "a", self.path, PASS, **options)
        return model

    def refused(self, error: type[Exception], text: str, **options: Any) -> None:
        """Loading fails with a text, and the model keeps no trace of it."""
        model = weft.MultiTaskModel(self.base, weft.linear_probe(self.base))
        with pytest.raises(error, match=text):
            load_peft(model, "a", self.path, PASS, **options)
        assert not model.task_names


def test_an_unharmed_folder_is_loaded(tmp_path: Path) -> None:
    folder, x = Folder(tmp_path), torch.randn(5, 6)
    assert torch.allclose(folder.load()(x, task="a"), folder.expected(x), atol=1e-6)


# -------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("what", ["norm.", "norm.bias", "norm.running_var"])
def test_a_module_that_was_stored_whole_must_be_whole(what: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.drop(what)
    name = r"norm\.\w+" if what == "norm." else what
    folder.refused(BankError, rf"lacks '{name}', .*modules_to_save.*leave=\['norm'\]")
    assert folder.load(leave=["norm"]).plan("a").patches == {}


@pytest.mark.parametrize(
    ("site", "options"),
    [
        ("first", {}),
        ("layers.0", {}),
        ("layers.1", {"target_modules": r"first|layers\.\d"}),
        ("last", {"target_modules": "all-linear"}),
        ("layers.1", {"target_modules": "all-linear", "exclude_modules": ["last"]}),
    ],
)
def test_a_layer_that_was_asked_for_must_be_there(
    site: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = Folder(tmp_path, **options)
    folder.configure(**{k: v for k, v in options.items() if k == "target_modules"})
    folder.load()
    folder.drop(f"{site}.lora")
    name = rf"{site}\.lora_[AB]\.weight"
    folder.refused(BankError, rf"lacks '{name}' and '{name}'.*target_modules.*[Ss]ave")


class Inner(nn.Module):
    """A part whose layer is called like one outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)


class Block(nn.Module):
    """A part that is there several times."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.other, self.embed = nn.Linear(2, 2), nn.Linear(2, 2), nn.Embedding(3, 2)
        self.inner = Inner()


class Deep(nn.Module):
    """Layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.blocks = nn.ModuleList([Block(), Block()])
        self.preinner = nn.Linear(2, 2)  # ends as "inner" does, without a dot


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["dense"]},
        {"target_modules": ["dense", "layers.1.other", "embed"]},
        {"target_modules": r".*(layers|blocks)\.1\.(dense|embed)"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear", "exclude_modules": r".*\.inner\..*"},
        {
            "target_modules": ["dense", "other"],
            "exclude_modules": ["inner.dense", "0.other"],
        },
        {"target_modules": ["dense"], "modules_to_save": ["inner"]},
        {"target_modules": ["dense", "other"], "modules_to_save": ["layers.0"]},
        {"target_modules": ["dense"], "layers_to_transform": [0, 2]},
        {"target_modules": ["dense", "blocks.0.other"], "layers_to_transform": 1},
        {"target_modules": ["dense"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
        {"target_modules": ["dense"], "layers_to_transform": 0, "layers_pattern": ["x", "blocks"]},
        {"target_modules": ["dense"], "layers_to_transform": [], "layers_pattern": ["blocks"]},
    ],
)
@pytest.mark.parametrize("inside", ["", "net."])
def test_names_have_pefts_meaning(options: dict[str, Any], inside: str, tmp_path: Path) -> None:
    base = Deep()
    whole = nn.ModuleDict({"net": base, "dense": nn.Linear(2, 2)}) if inside else base
    if inside and isinstance(options["target_modules"], str):
        options = {**options, "target_modules": "all-linear"}
    config = peft.LoraConfig(r=1, **options)
    config.save_pretrained(tmp_path)
    described = read_config(tmp_path)
    model = peft.get_peft_model(copy.deepcopy(whole), config).base_model.model
    start = f"{inside}"
    sites = [n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith("lora_A")]
    expected = {n.removeprefix(start) for n in sites if n.startswith(start)}
    assert set(adapted(base, described, inside)) == expected
    saved = get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(whole), config))
    names = [n.removeprefix(START) for n in saved if "lora_" not in n]
    stored = [n for n in whole.state_dict() if stored_by(n, described.modules_to_save)]
    assert sorted(stored) == sorted(names)


# ------------------------------------------------------------------------- what is too much


def test_tensors_of_the_base_itself_must_be_the_bases(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    weight = folder.base.last.weight.detach()
    for same in (weight.clone(), weight.bfloat16(), weight.double()):
        folder.put("last.weight", same)
        assert folder.load().plan("a").patches.keys() == {
            "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
            "norm.num_batches_tracked",
        }  # fmt: skip
    folder.put("last.weight", weight + 0.5)
    folder.refused(PlanError, r"'last.weight', .* differs .* up to 0\.5.*modules_to_save")
    folder.put("last.weight", torch.zeros(5, 6))
    folder.refused(PlanError, r"'last.weight', .* shape \(5, 6\), the base's is \(4, 6\)")


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("lats.weight", torch.zeros(4, 6))
    folder.refused(PlanError, r"'lats.weight', which has no form.*Close matches: last.weight")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("first.lora_A.weight", lambda t: t * torch.nan, "not finite"),
        ("first.lora_B.weight", lambda t: t / 0, "not finite"),
        ("norm.running_var", lambda t: t * torch.inf, "not finite"),
        ("first.lora_A.weight", lambda t: (9 * t).long(), "int64.*floating point"),
        ("first.lora_A.weight", lambda t: t.to(torch.complex64), "complex64.*floating point"),
        ("norm.running_var", lambda t: t.long(), "int64.*float32"),
        ("norm.num_batches_tracked", lambda t: t.float(), "float32.*int64"),
        ("first.lora_A.weight", lambda t: t[0, 0].clone(), r"shape \(\), the base asks for \(3, 6"),
        ("first.lora_A.weight", lambda t: t[0].clone(), r"rank 6, its configuration says 3"),
        ("first.lora_B.weight", lambda t: t[0, 0].clone(), r"shape \(\), the base asks for \(6, 3"),
    ],
)
def test_tensors_of_wrong_values_are_refused(
    name: str, change: Any, error: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    folder.put(name, change(folder.tensors()[START + name]))
    folder.refused((BankError, PlanError), f"'{name.split('.')[0]}.*{error}")  # type: ignore[arg-type]


def test_what_is_too_large_for_the_bases_type_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.base = folder.base.half()
    folder.put("first.lora_A.weight", torch.full((3, 6), 1e6))
    folder.refused(BankError, "'first.lora_A.weight' .*not finite as torch.float16")


def test_masks_of_the_base_may_be_infinite(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.base.norm.running_mean[0] = -torch.inf
    folder.put("norm.running_mean", folder.base.norm.running_mean.clone())
    folder.load()


def test_only_one_factor_is_refused_by_the_name_of_the_other(tmp_path: Path) -> None:
    for factor in "AB":
        folder = Folder(tmp_path / factor)
        folder.drop(f"first.lora_{factor}")
        folder.refused(BankError, rf"lacks 'first\.lora_{factor}\.weight'")


# ------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("r", 3.7, "a whole number of 1 or more"),
        ("r", "3", "a whole number of 1 or more"),
        ("r", True, "a whole number of 1 or more"),
        ("r", 0, "a whole number of 1 or more"),
        ("lora_alpha", "8", "a number other than 0"),
        ("lora_alpha", float("nan"), "a number other than 0"),
        ("lora_alpha", 10**400, "a number other than 0"),
        ("lora_dropout", 1.5, r"a number in \[0, 1\)"),
        ("lora_dropout", "x", r"a number in \[0, 1\)"),
        ("use_rslora", "false", "true or false"),
        ("use_rslora", 1, "true or false"),
        ("rank_pattern", ["a"], "ranks by regular expressions"),
        ("rank_pattern", {"first": 2.5}, "ranks by regular expressions"),
        ("rank_pattern", {"(": 2}, "ranks by regular expressions"),
        ("alpha_pattern", {"first": "x"}, "numbers other than 0 by regular expressions"),
        ("alpha_pattern", {"first": 0}, "numbers other than 0 by regular expressions"),
        ("modules_to_save", "norm", "a list of names"),
        ("modules_to_save", 3, "a list of names"),
        ("modules_to_save", [""], "a list of names"),
        ("target_modules", 3, "a list of names or a regular expression"),
        ("target_modules", ["first", 3], "a list of names or a regular expression"),
        ("target_modules", "(", "a list of names or a regular expression"),
        ("exclude_modules", {"first": 1}, "a list of names or a regular expression"),
        ("layers_to_transform", "1", "a whole number, or a list of them"),
        ("layers_to_transform", [1.5], "a whole number, or a list of them"),
        ("layers_pattern", 3, "a name, or a list of them"),
    ],
)
def test_values_of_wrong_types_are_refused_by_key(
    key: str, value: Any, expected: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    folder.configure(**{key: value})
    folder.refused(BankError, f"is damaged: '{key}' is .*, expected {expected}")


def test_what_a_configuration_may_leave_out(tmp_path: Path) -> None:
    folder, x = Folder(tmp_path), torch.randn(5, 6)
    keys = ("peft_type", "r", "lora_alpha", "modules_to_save", "init_lora_weights")
    config = json.loads((tmp_path / CONFIG).read_text())
    short = {key: config[key] for key in keys}
    (tmp_path / CONFIG).write_text(json.dumps(short))
    assert torch.allclose(folder.load()(x, task="a"), folder.expected(x), atol=1e-6)
    del short["r"]
    (tmp_path / CONFIG).write_text(json.dumps(short))
    folder.refused(BankError, "is damaged: 'r' is missing, expected a whole number")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "null", "\x00"])
def test_crafted_configurations_are_refused(text: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    folder.refused((BankError, PlanError), CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F6_E2M3"])
def test_types_that_torch_cannot_hold_are_refused(dtype: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    size = {"F4": 4, "F8_E8M0": 8, "F6_E2M3": 6}[dtype]
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * size
    (tmp_path / TENSORS).write_bytes(data)
    folder.refused(BankError, f"{TENSORS} is damaged")


# --------------------------------------------------------------------------- what is left out


def test_leave_is_advised_where_it_can_be_followed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, target_modules=["first", "last"])
    kept = folder.base
    folder.refused(PlanError, r"leave=\[\.\.\.\] is a list of modules, found 'norm'", leave="norm")
    folder.refused(PlanError, r"leave=\[\.\.\.\] is a list of modules, found 3", leave=3)
    folder.base = nn.Sequential()  # a part of PEFT's base that holds neither
    folder.base.first = kept.first
    folder.base.norm = nn.BatchNorm1d(7)
    folder.refused(PlanError, r"'last', which is no module of the base")
    folder.drop("last")
    folder.configure(target_modules=["first"])
    folder.refused(PlanError, r"'norm\.\w+' .*shape.*leave=\['norm'\]")
    folder.load(leave=["norm"])
    del folder.base.norm
    folder.refused(PlanError, r"'norm\.\w+', which has no form.*leave=\['norm'\]")
    folder.load(leave=["norm"])


def test_what_adapts_layers_outside_of_the_base_cannot_be_left_out(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.refused(
        PlanError,
        r"'first\.lora_A\.weight'.*not inside of 'layers'\. Correct prefix=.*",
        prefix="layers",
    )
    folder.drop("first", "norm.num", "norm.running", "norm.bias")
    folder.refused(PlanError, r"'norm.weight'.*'layers'.*leave=\['norm'\]", prefix="layers")
    folder.configure(target_modules=["layers.0"])
    folder.base = folder.base.layers
    folder.load(prefix="layers", leave=["norm"])


# -------------------------------------------------------------------------- what is no folder


def test_arguments_of_wrong_types_are_explained(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    model = folder.load()
    with pytest.raises(BankError, match="path is a folder's name, found 3"):
        load_peft(model, "b", 3, PASS)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"no task 'None'\. Tasks: a"):
        save_peft(model, None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="path is a folder's name, found None"):
        save_peft(model, "a", None)  # type: ignore[arg-type]
