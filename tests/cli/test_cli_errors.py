"""Wrong input: what was found, what was expected, what to do; exit code 2 and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from weft.bases import load_base
from weft.config import check, read
from weft.errors import ConfigError


@pytest.fixture
def content(experiment: Path) -> dict:
    return yaml.safe_load(experiment.read_text())


def test_a_misspelt_key_is_named_with_close_matches(content: dict) -> None:
    content["train"]["epoch"] = 3
    with pytest.raises(ConfigError, match=r"train\.epoch: no such key\. Close matches: epochs"):
        check(content)


def test_a_misspelt_key_of_a_task_is_named(content: dict) -> None:
    content["tasks"]["red"]["dta"] = "x"
    with pytest.raises(ConfigError, match=r"tasks\.red\.dta: no such key\. Close matches: data"):
        check(content)


def test_a_wrong_value_is_shown(content: dict) -> None:
    content["train"]["epochs"] = "many"
    with pytest.raises(ConfigError, match=r"train\.epochs: found 'many'.*integer"):
        check(content)


def test_every_error_is_listed(content: dict) -> None:
    content["train"]["lr"] = -1
    content["colour"] = "red"
    with pytest.raises(ConfigError) as error:
        check(content)
    assert "2 errors" in str(error.value)
    assert "train.lr: found -1" in str(error.value)
    assert "colour: no such key" in str(error.value)


def test_a_missing_section_is_named(content: dict) -> None:
    del content["base"]
    with pytest.raises(ConfigError, match="base: missing"):
        check(content)


@pytest.mark.parametrize("override", ["train.lr", "=3", "output.folder=x"])
def test_a_wrong_override_is_refused(experiment: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        read(experiment, [override])


def test_numbers_in_overrides_are_numbers(experiment: Path) -> None:
    assert read(experiment, ["train.lr=1e-3"]).train.lr == 1e-3
    assert read(experiment, ["method.penalty=2"]).method.options["penalty"] == 2
    assert read(experiment, ["method.options.penalty=2"]).method.options["warmup"] == 1
    chosen = read(experiment, ["method=taps", "method.penalty=1"]).method
    assert (chosen.name, chosen.options) == ("taps", {"penalty": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- a", "expected keys"), ("", "expected keys")],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(file)


def test_errors_are_one_message_and_exit_code_two(experiment: Path, weft_command) -> None:
    code, _, err = weft_command("train", experiment, "--set", "method=tapz")
    assert code == 2
    assert "Close matches: taps" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.yaml"), "There is no file"),
        (("bank", "list", "nowhere"), "nowhere"),
        (("eval", "EXPERIMENT", "--task", "rde"), "Close matches: red"),
        (("train", "EXPERIMENT", "--set", "method.penalti=1"), "penalti"),
        (("train", "EXPERIMENT", "--set", "tasks.red.data=npz:none.npz"), "none.npz"),
        (("train", "EXPERIMENT", "--set", "base.name=tim:resnet18"), "Close matches: timm"),
        (("train", "EXPERIMENT", "--set", "base.weights=none.safetensors"), "none.safetensors"),
        (("train", "EXPERIMENT", "--set", "tasks.red.classes=5"), "found 5"),
        (("fold", "EXPERIMENT", "red", "-o", "x.bin"), "safetensors"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    experiment: Path, weft_command, arguments: tuple[str, ...], message: str
) -> None:
    chosen = [experiment if a == "EXPERIMENT" else a for a in arguments]
    code, _, err = weft_command(*chosen)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err


def test_a_function_that_is_not_there_is_named(experiment: Path) -> None:
    with pytest.raises(ConfigError, match=r"no function 'mke'.*make"):
        load_base(f"python:{experiment.parent / 'net.py'}:mke")


def test_a_wrong_option_of_a_base_is_named(experiment: Path) -> None:
    with pytest.raises(ConfigError, match="depth"):
        load_base(f"python:{experiment.parent / 'net.py'}:make", options={"depth": 3})


def test_weights_that_do_not_fit_are_refused(experiment: Path, tmp_path: Path) -> None:
    bad = tmp_path / "weights.safetensors"
    bad.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="do not fit"):
        load_base(f"python:{experiment.parent / 'net.py'}:make", weights=bad)


def test_library_bases_have_no_classifier_and_state_their_preprocessing() -> None:
    timm, scale = load_base("timm:resnet18", options={"pretrained": False})
    assert timm.num_features == 512
    assert scale is not None
    assert len(scale.mean) == 3
    vision, _ = load_base("torchvision:resnet18", options={"pretrained": False})
    assert not list(vision.fc.parameters())
    with pytest.raises(ConfigError, match=r"Close matches: .*resnet18"):
        load_base("timm:resnet81")


def test_numbers_with_exponents_are_numbers_in_options(experiment: Path) -> None:
    assert read(experiment, ["method.penalty=1e-1"]).method.options["penalty"] == 0.1


def test_an_override_that_is_no_yaml_is_refused(experiment: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'train\.lr=\[' is not YAML"):
        read(experiment, ["train.lr=["])


def test_an_option_of_the_wrong_type_is_named(experiment: Path, weft_command) -> None:
    code, _, err = weft_command("train", experiment, "--set", "method.penalty=high")
    assert code == 2
    assert "taps(penalty=...) is a number >= 0, found 'high'" in err


def test_a_classifier_in_the_weights_is_left_out(tmp_path: Path) -> None:
    import torchvision

    whole = torchvision.models.resnet18()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    base, _ = load_base("torchvision:resnet18", weights=tmp_path / "whole.pth")
    assert torch.equal(base.conv1.weight, whole.conv1.weight)
