"""Each format computes what the model computes, for any number of rows, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from exports import NOT_EXPORTED, SMALL, TIED, Case, words
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import weft
from laws.bases import BASES, Base
from laws.cases import assert_close, call, features
from weft.errors import PlanError
from weft.exporting import FORMATS, export
from weft.registry import METHODS

QUICK = ("convolutions",)


def bases() -> list[object]:
    """All bases of the laws; most of them are slow to export."""
    slow = pytest.mark.slow
    return [pytest.param(b, id=b.name, marks=() if b.name in QUICK else slow) for b in BASES]


def run(file: Path, inputs: object) -> list[Tensor]:
    """The outputs of an exported graph."""
    named = inputs if isinstance(inputs, dict) else None
    if file.suffix == ".pt2":
        with torch.no_grad():
            output = call(torch.export.load(file).module(), inputs)
        return list(torch.utils._pytree.tree_leaves(output))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (first, *_) = session.get_inputs()
    feeds = {n: t.numpy() for n, t in (named or {first.name: inputs}).items()}
    return [torch.from_numpy(a) for a in session.run(None, feeds)]


def exported(model: weft.MultiTaskModel, folder: Path, format: str, **options: object) -> Path:
    suffix = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}[format]
    return export(model, "a", folder / f"a{suffix}", format=format, **options)


def gated(model: weft.MultiTaskModel, on: bool) -> None:
    """Let task a execute all blocks, with or without their gates."""
    values = {"temperature": 0.0, "execute": True, "gated": on}
    for key, tensor in model.tasks["a"].own.items():
        what = key.rpartition(":")[2]
        if what in values:
            tensor.fill_(values[what])


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("base", bases())
def test_a_graph_agrees_for_any_number_of_rows(base: Base, format: str, tmp_path: Path) -> None:
    model = Case("full_finetune", base).trained().train()
    file = exported(model, tmp_path, format)
    assert model.training
    model.eval()
    for rows in (1, 2, 7):
        x = base.inputs(rows)
        with torch.no_grad():
            (found,) = run(file, x)
            assert_close(found, model(x, task="a"), 1e-5 if format == "torch" else 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_as_a_program_or_says_why_not(method: str, tmp_path: Path) -> None:
    model = Case(method, SMALL).trained().eval()
    if method in NOT_EXPORTED:
        gated(model, True)
        for format in FORMATS:
            with pytest.raises(PlanError, match=f"'a' \\({method}\\).*{NOT_EXPORTED[method]}"):
                exported(model, tmp_path, format)
        assert not list(tmp_path.iterdir())
        return
    file = exported(model, tmp_path, "torch")
    with torch.no_grad():
        x = SMALL.inputs(4)
        assert_close(run(file, x)[0], model(x, task="a"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in NOT_EXPORTED])
def test_every_method_leaves_as_onnx(method: str, tmp_path: Path) -> None:
    model = Case(method, SMALL).trained().eval()
    file = exported(model, tmp_path, "onnx")
    with torch.no_grad():
        x = SMALL.inputs(4)
        assert_close(run(file, x)[0], model(x, task="a"), 1e-4)


def test_gates_that_are_not_in_use_do_not_stay_behind(tmp_path: Path) -> None:
    model = Case("dynashare", SMALL).trained().eval()
    gated(model, False)
    x = SMALL.inputs(2)
    with torch.no_grad():
        assert_close(run(exported(model, tmp_path, "torch"), x)[0], model(x, task="a"))


@pytest.mark.parametrize("format", FORMATS)
def test_skipped_blocks_are_gone(format: str, tmp_path: Path) -> None:
    model = Case("adashare", SMALL).trained().eval()
    fewer = sum(p.numel() for p in model.fold("a").parameters())
    assert fewer < 0.9 * sum(p.numel() for p in model.base.parameters())
    file = exported(model, tmp_path, format, head=False)
    assert weights_in(file) <= fewer


def weights_in(file: Path) -> int:
    """How many weights a file holds, without running statistics."""
    if file.suffix == ".safetensors":
        return sum(t.numel() for n, t in load_file(file).items() if n.endswith(("weight", "bias")))
    if file.suffix == ".pt2":
        return sum(p.numel() for p in torch.export.load(file).parameters())
    tensors = onnx.load(file).graph.initializer
    return sum(onnx.numpy_helper.to_array(t).size for t in tensors if t.dims and len(t.dims) > 1)


def test_tied_tensors_are_under_each_of_their_names(tmp_path: Path) -> None:
    model = Case("full_finetune", TIED).trained()
    tensors = load_file(exported(model, tmp_path, "safetensors"))
    assert torch.equal(tensors["base.embed.weight"], tensors["base.out.weight"])
    assert torch.equal(tensors["base.embed.weight"], model.tensors("a")["embed.weight"])
    head = model.head("a").state_dict()
    plain = {n.removeprefix("base.") for n in tensors if n.startswith("base.")}
    assert plain == set(TIED.make().state_dict())
    assert {n for n in tensors if n.startswith("head.")} == {f"head.{n}" for n in head}


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_inputs_go_by_the_names_of_the_base(format: str, tmp_path: Path) -> None:
    model = Case("full_finetune", TIED).trained().eval()
    file = exported(model, tmp_path, format)
    x = words(3)
    with torch.no_grad():
        assert_close(run(file, x)[0], model(x, task="a"), 1e-4)
        x = dict(reversed(x.items()))
        assert_close(run(file, x)[0], model(x, task="a"), 1e-4)
    if format == "onnx":
        graph = onnx.load(file).graph
        assert {i.name for i in graph.input} == {"ids", "mask", "scale"}
        assert [o.name for o in graph.output] == ["output"]
        assert {i.type.tensor_type.shape.dim[0].dim_param for i in graph.input} == {"rows"}


def test_files_say_what_they_are(tmp_path: Path) -> None:
    model = weft.MultiTaskModel(SMALL.make(), weft.bias_only(SMALL.make()), example=SMALL.inputs(1))
    model.add_task("a", weft.Classification(["cat", "dog"]))
    told = {"weft.task": "a", "weft.method": "bias_only", "weft.base": "Small"}
    files = {format: exported(model, tmp_path, format) for format in FORMATS}
    extra = {"weft.json": ""}
    torch.export.load(files["torch"], extra_files=extra)
    with safe_open(files["safetensors"], "pt") as opened:
        stored = opened.metadata()
    props = {p.key: p.value for p in onnx.load(files["onnx"]).metadata_props}
    for found in (json.loads(extra["weft.json"]), stored, props):
        assert told.items() <= found.items()
        assert json.loads(found["weft.classes"]) == ["cat", "dog"]


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_nothing_of_the_example_or_of_this_machine_is_in_a_graph(
    format: str, tmp_path: Path
) -> None:
    case = Case("linear_probe", SMALL)
    marked = torch.full((1, 3, 8, 8), 0.123456789)
    model = weft.MultiTaskModel(SMALL.make(), case.plan(SMALL.make()), example=marked)
    model.add_task("a", weft.Classification(3))
    file = exported(model, tmp_path, format)
    content = file.read_bytes()
    assert str(Path(weft.__file__).parent).encode() not in content
    assert Path(torch.__file__).parent.as_posix().encode() not in content
    assert marked.numpy().tobytes()[:16] not in content
    if format == "torch":
        args, _ = torch.export.load(file).example_inputs
        assert not args[0].any()


def test_without_its_head_a_task_gives_what_heads_read(tmp_path: Path) -> None:
    base = next(b for b in BASES if b.name == "convolutions")
    model = Case("taps", base).trained().eval()
    x = base.inputs(3)
    with torch.no_grad():
        expected = features(call(model.view("a"), x), base)
        assert_close(run(exported(model, tmp_path, "torch", head=False), x)[0], expected)
    plain = base.make().eval()
    plain.load_state_dict(load_file(exported(model, tmp_path, "safetensors", head=False)))
    with torch.no_grad():
        assert_close(plain(x), expected)


class ManyInputs(nn.Module):
    """Takes a pair, a number, a table for all rows, and an input that it does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        table: Tensor,
        *,
        ignored: Tensor | None = None,  # noqa: ARG002
        factor: float = 1.0,
    ) -> Tensor:
        return self.layer(x + pair[0] - pair[1]) * factor + table.mean(0)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_inputs_may_be_nested_fixed_or_common_to_all_rows(format: str, tmp_path: Path) -> None:
    def batch(rows: int) -> dict[str, object]:
        x, one, other = torch.randn(3, rows, 4)
        ignored = torch.randn(rows, 2)
        return {"x": x, "pair": (one, other), "table": table, "ignored": ignored, "factor": 3.0}

    table = torch.randn(7, 8)
    model = weft.MultiTaskModel(ManyInputs(), weft.bias_only(ManyInputs()), example=batch(1))
    model.add_task("a", weft.Regression(2))
    file = exported(model, tmp_path, format)
    x = batch(4)
    with torch.no_grad():
        expected = model.eval()(x, task="a")
    if format == "onnx":
        one, other = x.pop("pair")
        del x["factor"]
        x |= {"pair_0": one, "pair_1": other}
        assert {i.name for i in onnx.load(file).graph.input} == x.keys()
    assert_close(run(file, x)[0], expected, 1e-4)


class TwoAnswers(nn.Module):
    """A head of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.layer(x)
        return {"scores": scores, "best": scores.argmax(1)}


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_heads_of_several_outputs_keep_their_names(format: str, tmp_path: Path) -> None:
    model = weft.MultiTaskModel(SMALL.make(), weft.taps(SMALL.make()), example=SMALL.inputs(1))
    model.add_task("a", weft.Task(head=TwoAnswers(), loss=nn.functional.mse_loss))
    file = exported(model, tmp_path, format)
    x = SMALL.inputs(4)
    with torch.no_grad():
        expected = model.eval()(x, task="a")
    found = run(file, x)
    if format == "onnx":
        names = [o.name for o in onnx.load(file).graph.output]
        assert names == ["output_scores", "output_best"]
    assert_close(found[0], expected["scores"], 1e-4)
    assert torch.equal(found[1], expected["best"])


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    model = Case("taps", SMALL).trained().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    exported(model, tmp_path, "torch")
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.head("a").training


@pytest.mark.parametrize("format", FORMATS)
def test_a_task_leaves_in_inference_mode_too(format: str, tmp_path: Path) -> None:
    model = Case("taps", SMALL).trained().eval()
    with torch.inference_mode():
        file = exported(model, tmp_path, format, example=SMALL.inputs(1))
    if format != "safetensors":
        x = SMALL.inputs(4)
        with torch.no_grad():
            assert_close(run(file, x)[0], model(x, task="a"), 1e-4)
