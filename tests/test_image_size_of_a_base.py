"""``image_size: base``: the side that the base's own library states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft import config
from weft.bases import stated_image_size
from weft.comparing.config import read_comparison
from weft.errors import ConfigError


def content(base: dict[str, Any]) -> dict[str, Any]:
    tasks = {"cats": {"data": "imagefolder:cats"}}
    return {"base": base, "tasks": tasks, "data": {"image_size": "base", "batch_size": 4}}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("timm:resnet18", 224),
        ("timm:efficientnet_b3", 288),
        ("timm:vit_base_patch16_384", 384),
        ("torchvision:inception_v3", 299),
        ("torchvision:resnet18", 224),
    ],
)
def test_libraries_state_the_size_of_their_images(name: str, side: int) -> None:
    pytest.importorskip(name.split(":")[0])
    assert stated_image_size(name) == side


def test_a_size_that_the_base_is_made_with_is_the_answer() -> None:
    assert stated_image_size("timm:vit_base_patch16_224", {"img_size": 96}) == 96


@pytest.mark.parametrize(
    ("stored", "side"),
    [
        ({"size": {"height": 48, "width": 48}}, 48),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, 32),
        ({"size": {"shortest_edge": 40}}, 40),
    ],
)
def test_a_transformers_model_states_it_in_its_processor(
    tmp_path: Path, stored: dict[str, Any], side: int
) -> None:
    pytest.importorskip("transformers")
    processor = {"image_processor_type": "ViTImageProcessor", **stored}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert stated_image_size(f"hf:{tmp_path}") == side


def test_a_file_says_base_and_holds_the_number(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    base = {"name": "timm:efficientnet_b3", "options": {"pretrained": False}}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({**content(base), "method": "linear_probe"}))
    assert config.read(file).data.image_size == 288
    assert config.read(file, ["data.image_size=64"]).data.image_size == 64
    compared = read_comparison({**content(base), "methods": ["linear_probe"]})
    assert compared.data.image_size == 288
    assert compared.data.batch_size == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:resnet81", "Close matches: .*resnet"),
        ("timm:resnet18.nope", "no weights 'resnet18.nope'"),
        ("torchvision:resnet81", "Close matches: .*resnet"),
        ("torchvision:deeplabv3_resnet50", "states none"),
    ],
)
def test_names_that_state_nothing_are_told(name: str, said: str) -> None:
    pytest.importorskip(name.split(":")[0])
    with pytest.raises(ConfigError, match=said):
        stated_image_size(name)


def test_a_base_that_states_no_size_needs_a_number() -> None:
    with pytest.raises(ConfigError, match=r"states none\. Give the side of a square"):
        config.check({**content({"name": "python:net.py:make"}), "method": "linear_probe"})
