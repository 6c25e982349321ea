"""One stored task as a file that needs no weft, by the command line."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import weft
from weft.bases import load_base
from weft.config import read


@pytest.fixture
def trained(experiment: Path, weft_command) -> Path:
    """The experiment once it has been trained."""
    assert weft_command("train", experiment, "--json")[0] == 0
    return experiment


def expected(experiment: Path, x: torch.Tensor) -> torch.Tensor:
    """What the stored task computes."""
    base, _ = load_base(read(experiment).base.name)
    model = weft.Bank(experiment.parent / "run" / "bank").load(base).eval()
    with torch.no_grad():
        return model(x, task="red")


def test_every_format_leaves_an_experiment_and_its_bank(
    trained: Path, weft_command, tmp_path: Path
) -> None:
    x = torch.randn(3, 3, 8, 8)
    bank = trained.parent / "run" / "bank"
    shape = ("--input-shape", "3,8,8")
    named = (bank, "--base", read(trained).base.name, *shape)
    sources = {"yaml": (trained,), "bank": (bank, *shape), "named": named}
    for source, (place, *options) in sources.items():
        for suffix in ("onnx", "pt2", "safetensors"):
            file = tmp_path / f"{source}.{suffix}"
            code, out, err = weft_command("export", place, "red", "-o", file, *options)
            assert code == 0, err
            assert f"{source}.{suffix}" in out.replace("\n", "")
        program = torch.export.load(tmp_path / f"{source}.pt2").module()
        session = onnxruntime.InferenceSession(tmp_path / f"{source}.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(program(x), expected(trained, x))
        torch.testing.assert_close(torch.from_numpy(found), expected(trained, x))
    one, *others = (load_file(tmp_path / f"{source}.safetensors") for source in sources)
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bank_made_by_hand_asks_for_its_base(weft_command, tmp_path: Path) -> None:
    base = torch.nn.Linear(4, 4)
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=torch.randn(1, 4))
    model.add_task("red", weft.Classification(2))
    weft.Bank(tmp_path / "bank").save(model)
    code, _, err = weft_command("export", tmp_path / "bank", "red", "-o", tmp_path / "red.onnx")
    assert code == 2
    assert "Name it: --base" in " ".join(err.split())


def test_without_the_head_names_are_the_bases(trained: Path, weft_command, tmp_path: Path) -> None:
    file = tmp_path / "red.bin"
    arguments = ("export", trained, "red", "-o", file, "--format", "safetensors", "--no-head")
    assert weft_command(*arguments)[0] == 0
    load_base(read(trained).base.name)[0].load_state_dict(load_file(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("YAML", "red", "-o", "red.xyz"), "ends in none of"),
        (("YAML", "red", "-o", "red.onnx", "--format", "torch"), "another format than torch"),
        (("YAML", "red", "-o", "red.xyz", "--format", "onx"), "Close matches: onnx"),
        (("YAML", "red", "-o", "red.onnx", "--base", "timm:x"), "belong to a bank"),
        (("YAML", "rod", "-o", "red.onnx"), "red"),
        (("BANK", "red", "-o", "red.onnx"), "--input-shape 3,224,224"),
        (("BANK", "red", "-o", "red.onnx", "--input-shape", "3x8"), "found '3x8'"),
        (("BANK", "rod", "-o", "red.onnx", "--input-shape", "3,8,8"), "red"),
        (("BANK", "red", "-o", "red.onnx", "--set", "seed=1"), "a bank has none"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    trained: Path, weft_command, arguments: tuple[str, ...], message: str
) -> None:
    bank = trained.parent / "run" / "bank"
    names = {"YAML": trained, "BANK": bank}
    code, _, err = weft_command("export", *(names.get(a, a) for a in arguments))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"base": {"name": 3}}, "name='3'; expected a str"),
        ({"base": {"name": "x"}, "seed": "y"}, "seed='y'; expected a int"),
        ("run 7", "does not say where its base is from"),
    ],
)
def test_facts_of_a_wrong_type_are_named(
    facts: object, message: str, weft_command, tmp_path: Path
) -> None:
    base = torch.nn.Linear(4, 4)
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=torch.randn(1, 4))
    model.add_task("red", weft.Classification(2))
    model.tasks["red"].facts["experiment"] = facts
    weft.Bank(tmp_path / "bank").save(model)
    code, _, err = weft_command("export", tmp_path / "bank", "red", "-o", tmp_path / "a.pt2")
    assert code == 2
    assert message in " ".join(err.split())
    code, _, err = weft_command(
        "export", tmp_path / "bank", "red", "-o", tmp_path / "a.safetensors",
        "--input-shape", "3,-1", "--base", "python:x.py:f",
    )  # fmt: skip
    assert code == 2
    assert "error:" in err
