"""Several tasks leave as one graph that takes each row's task as an input."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from exports import SMALL, TIED, Case, words

import weft
from laws.bases import Base
from laws.cases import assert_close, call, disturb
from weft.errors import ConfigError, DataError, PlanError
from weft.exporting import export

CHOSEN = ("linear_probe", "scale_bias", "bias_only")
"""Methods whose graph does not depend on which rows belong to which task."""


def model_of(method: str, base: Base = SMALL) -> weft.MultiTaskModel:
    """Four tasks with heads of one shape that look trained."""
    tasks = {name: weft.Classification(["x", "y", "z"]) for name in "abcd"}
    model = Case(method, base).model(None, **tasks)
    disturb(model)
    return model.eval()


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("method", CHOSEN)
def test_each_row_gets_its_tasks_answer(method: str, format: str, tmp_path: Path) -> None:
    model = model_of(method)
    file = export(model, ["c", "a", "d"], tmp_path / f"{format}.pt2", format=format)
    for ids in ([2, 0, 1, 1, 0, 2, 2], [1], [0, 0]):
        x, task = SMALL.inputs(len(ids)), torch.tensor(ids)
        with torch.no_grad():
            expected = model(x, task=["cad"[i] for i in ids])
            if format == "torch":
                found = torch.export.load(file).module()(x, task=task)
            else:
                session = onnxruntime.InferenceSession(file)
                feeds = {"image": x.numpy(), "task": task.numpy()}
                found = torch.from_numpy(session.run(None, feeds)[0])
        assert_close(found, expected, 1e-5 if format == "torch" else 1e-4)


def test_one_graph_says_which_index_is_which_task(tmp_path: Path) -> None:
    file = export(model_of("linear_probe"), ["c", "a"], tmp_path / "a.onnx", format="onnx")
    loaded = onnx.load(file)
    told = {p.key: p.value for p in loaded.metadata_props}
    assert json.loads(told["weft.tasks"]) == ["c", "a"]
    assert json.loads(told["weft.classes"])["c"] == ["x", "y", "z"]
    rows = {i.name: i.type.tensor_type.shape.dim[0].dim_param for i in loaded.graph.input}
    assert rows == {"image": "rows", "task": "rows"}


def test_inputs_by_keyword_go_along(tmp_path: Path) -> None:
    model = model_of("bias_only", TIED)
    file = export(model, ["a", "b"], tmp_path / "a.pt2", format="torch")
    x = words(3)
    with torch.no_grad():
        expected = model(x, task=["b", "a", "b"])
        module = torch.export.load(file).module()
        assert_close(call(module, {**x, "task": torch.tensor([1, 0, 1])}), expected)


def test_what_does_not_leave_together_says_so(tmp_path: Path) -> None:
    model = model_of("linear_probe")
    with pytest.raises(ConfigError, match="task by task"):
        export(model, ["a", "b"], tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="head=True"):
        export(model, ["a", "b"], tmp_path / "a", format="torch", head=False)
    with pytest.raises(PlanError):
        export(model_of("full_finetune"), ["a", "b"], tmp_path / "a", format="torch")
    named = {"task": SMALL.inputs(1)}
    with pytest.raises(DataError, match="input 'task' of its own"):
        export(model, ["a", "b"], tmp_path / "a", format="torch", example=named)
    assert not list(tmp_path.iterdir())


def test_what_is_no_task_is_not_answered(tmp_path: Path) -> None:
    """As docs/exporting.md says."""
    model = model_of("linear_probe")
    x = SMALL.inputs(2)
    program = torch.export.load(export(model, ["c", "a"], tmp_path / "a.pt2")).module()
    for index in (-1, 2):
        with pytest.raises(IndexError):
            program(x, task=torch.tensor([0, index]))
    session = onnxruntime.InferenceSession(export(model, ["c", "a"], tmp_path / "a.onnx"))

    def found(*task: int) -> torch.Tensor:
        feeds = {"image": x.numpy(), "task": torch.tensor(task).numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])

    assert_close(found(-1, -2), found(1, 0), 1e-6)
    with pytest.raises(Exception, match="out of data bounds"):
        found(0, 2)
