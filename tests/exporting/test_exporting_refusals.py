"""What cannot leave says why; a file appears whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from exports import SMALL, Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import weft
from weft import files
from weft.errors import ConfigError, DataError, ExportError, MissingExtra, PlanError, TaskError
from weft.exporting import FORMATS, export
from weft.exporting.batches import joined


def model_of(base: nn.Module, head: nn.Module | None = None, x: object = None):
    """A task on a base that takes vectors of four numbers."""
    example = torch.randn(1, 4) if x is None else x
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=example)
    model.add_task("a", weft.Task(head=head, loss=nn.functional.mse_loss))
    return model


class Deciding(nn.Linear):
    """Goes on by a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class FixedRows(nn.Linear):
    """Unrolls the rows of its first batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(FixedRows, self).forward(row) for row in x])


class ForOneRow(nn.Linear):
    """Answers differently for one row."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return -y if x.shape[0] == 1 else y


class Untranslated(nn.Linear):
    """Uses what ONNX has no word for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.special.bessel_j0(x)


def test_a_wrong_format_is_named_with_close_matches(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no format 'onx'\. Formats: .* Close matches: onnx"):
        export(Case("taps", SMALL).model(), "a", tmp_path / "a", format="onx")


def test_without_a_format_the_name_says_it(tmp_path: Path) -> None:
    model = model_of(nn.Linear(4, 4))
    for suffix, start in {"pt2": b"PK", "safetensors": None, "onnx": b"\x08"}.items():
        file = export(model, "a", tmp_path / f"a.{suffix}")
        assert start is None or file.read_bytes().startswith(start)
    for name in ("a", "a.onxx", "a.ONNX.bak"):
        with pytest.raises(ConfigError, match=r"ends in none of \.safetensors, \.pt2, \.onnx"):
            export(model, "a", tmp_path / name)
    assert export(model, "a", tmp_path / "b", format="torch").read_bytes().startswith(b"PK")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("task", [0, 1.5, None, [0], ["a", 1], {"a"}])
def test_what_is_no_name_of_a_task_is_refused(task: object, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="A task leaves by its name"):
        export(model_of(nn.Linear(4, 4)), task, tmp_path / "a.pt2")
    with pytest.raises(TaskError, match="list of tasks is empty"):
        export(model_of(nn.Linear(4, 4)), [], tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_places_in_structures_have_names() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    value = {"a": [torch.zeros(1), Pair(torch.zeros(1), torch.zeros(1))], 3: torch.zeros(1)}
    leaves, _ = pytree.tree_flatten_with_path(value)
    assert [joined(path) for path, _ in leaves] == ["a_0", "a_1_left", "a_1_right", "3"]


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task 'd'"):
        export(Case("taps", SMALL).model(), "d", tmp_path / "a.safetensors")


def test_a_graph_asks_for_an_example(tmp_path: Path) -> None:
    base = nn.Linear(4, 4)
    model = weft.MultiTaskModel(base, weft.bias_only(base))
    model.add_task("a", weft.Task(head=nn.Linear(4, 2), loss=nn.functional.mse_loss))
    export(model, "a", tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"example=x"):
        export(model, "a", tmp_path / "a.pt2", format="torch")
    with pytest.raises(DataError, match="no rows"):
        export(model, "a", tmp_path / "a.pt2", format="torch", example={"x": 3})
    with pytest.raises(DataError, match=r"fails on the example, shape \(1, 5\)"):
        export(model, "a", tmp_path / "a.pt2", format="torch", example=torch.randn(1, 5))
    export(model, "a", tmp_path / "a.pt2", format="torch", example=torch.randn(1, 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt2", "a.safetensors"]


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_control_flow_by_values_has_no_graph(format: str, tmp_path: Path) -> None:
    model = model_of(Deciding(4, 3))
    with pytest.raises(ExportError, match=r"no graph for 'a'.*data-dependent.*torch\.where.*safet"):
        export(model, "a", tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())
    export(model, "a", tmp_path / "a.safetensors")


def test_a_network_for_one_number_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="rows"):
        export(model_of(FixedRows(4, 3)), "a", tmp_path / "a", format="torch")
    with pytest.raises(ExportError, match="number of rows"):
        export(model_of(ForOneRow(4, 3)), "a", tmp_path / "a", format="torch")
    assert not list(tmp_path.iterdir())


def test_what_onnx_has_no_word_for_is_named(tmp_path: Path) -> None:
    model = model_of(Untranslated(4, 4))
    with pytest.raises(ExportError, match=r"no form in ONNX.*format='torch'"):
        export(model, "a", tmp_path / "a", format="onnx")
    export(model, "a", tmp_path / "a", format="torch")


def test_networks_too_large_for_onnx_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("weft.exporting.onnx_graph.LARGEST", 10)
    with pytest.raises(ExportError, match="holds at most 10"):
        export(model_of(nn.Linear(4, 4)), "a", tmp_path / "a", format="onnx")


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(library: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=r"pip install 'weft-share\[onnx\]'"):
        export(model_of(nn.Linear(4, 4)), "a", tmp_path / "a", format="onnx")


def test_a_head_that_reads_side_sites_stays(tmp_path: Path) -> None:
    base = nn.Linear(4, 4)
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=torch.randn(1, 4))
    task = weft.Task(head=nn.Linear(4, 2), loss=nn.functional.mse_loss, taps=True)
    model.add_task("a", task)
    with pytest.raises(PlanError, match="side sites"):
        export(model, "a", tmp_path / "a.safetensors")
    export(model, "a", tmp_path / "a.safetensors", head=False)


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Keeping(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(ExportError, match=r"'base\._extra_state' .* is a dict"):
        export(model_of(Keeping(4, 4)), "a", tmp_path / "a.safetensors")


def test_a_folded_network_that_does_not_run_is_refused(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    model = weft.MultiTaskModel(base, weft.adashare(base, example=x), example=x)
    model.add_task("a", weft.Classification(3))
    model.tasks["a"].own["layers.0:execute"].fill_(False)
    for format in FORMATS:
        with pytest.raises(PlanError, match=r"'a' .*folded network fails.*reads its attributes"):
            export(model, "a", tmp_path / "a", format=format)
    model.example = None  # nothing to try the folded network on, before it is exported
    for format in FORMATS:
        with pytest.raises(ExportError, match=r"folded network of 'a'.*reads its attributes"):
            export(model, "a", tmp_path / "a", format=format, example=x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_answer_is_never_written(format: str, tmp_path: Path) -> None:
    class Wrong(nn.Linear):
        """Answers differently where it is captured or folded."""

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 1e-2 if self is not original[0] else y

    original: list[nn.Module] = []
    model = model_of(Wrong(4, 3))
    original.append(model.view("a").structure)
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match="differ by"):
        export(model, "a", target, format=format)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(ExportError, match="not permitted"):
        export(model_of(nn.Linear(4, 4)), "a", folder / "a.safetensors")


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk .* is full"), (errno.EROFS, "not permitted"), (errno.EIO, "Use another")],
)
def test_failing_disks_leave_what_was_there(
    tmp_path: Path, monkeypatch, code: int, message: str
) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    real = files.write_file

    def failing(path: Path, data: bytes) -> None:
        real(path, data[: len(data) // 2])
        if data:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "write_file", failing)
    with pytest.raises(ExportError, match=f"{message}.*before is unharmed"):
        export(model_of(nn.Linear(4, 4)), "a", target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_are_no_file_are_refused(tmp_path: Path) -> None:
    model = model_of(nn.Linear(4, 4))
    with pytest.raises(ExportError, match="is a folder"):
        export(model, "a", tmp_path, format="safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="cannot be written"):
        export(model, "a", tmp_path / "file" / "a.onnx")
    assert export(model, "a", tmp_path / "new" / "folder" / "a.safetensors").is_file()
