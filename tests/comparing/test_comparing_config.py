"""The file of a comparison: what it means, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weft
from weft.comparing import read_comparison
from weft.comparing.config import label
from weft.errors import ConfigError


def test_a_grid_is_every_combination_of_its_values(content: dict[str, Any]) -> None:
    content["methods"] = [
        "linear_probe",
        {"name": "taps", "warmup": 1, "grid": {"penalty": [0.1, 1.0], "harden": [0.3, 0.5]}},
    ]
    variants = read_comparison(content).variants()
    assert [(c.name, options) for c, options in variants] == [
        ("linear_probe", {}),
        *(
            ("taps", {"warmup": 1, "penalty": p, "harden": h})
            for p in (0.1, 1.0)
            for h in (0.3, 0.5)
        ),
    ]


def test_all_is_every_registered_method_and_a_number_of_seeds_counts_them(
    content: dict[str, Any],
) -> None:
    comparison = read_comparison({**content, "methods": "all", "seeds": 3})
    assert [choice.name for choice in comparison.methods] == list(weft.METHODS)
    assert comparison.seeds == (0, 1, 2)


def test_a_label_says_what_differs() -> None:
    assert label("taps", {"penalty": 0.3}, {"lr": 0.01}) == "taps penalty=0.3 train.lr=0.01"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["tabs"]}, ["methods.0.name: found 'tabs'", "Close matches: taps"]),
        ({"methods": [{"name": "taps", "penalti": 1}]}, ["methods.0", "no option 'penalti'"]),
        (
            {"methods": [{"name": "taps", "penalty": 1, "grid": {"penalty": [1]}}]},
            ["'penalty' is in options and in grid"],
        ),
        ({"methods": [{"name": "taps", "grid": {"penalty": []}}]}, ["methods.0.grid", "penalty"]),
        (
            {"methods": [{"name": "taps", "train": {"leer": 1}}]},
            ["methods.0.train.leer: no such key", "lr"],
        ),
        ({"methods": [{"name": "taps", "train": {"precision": "bf16"}}]}, ["one for all methods"]),
        ({"methods": [{"name": "taps", "tasks": ["rot"]}]}, ["methods.0.tasks", "'rot'", "red"]),
        ({"methods": ["taps", {"name": "taps"}]}, ["'taps' is there twice for 'bright'"]),
        ({"methods": []}, ["methods"]),
        ({"seeds": [1, 1]}, ["seeds: found", "different"]),
        ({"sedes": 3}, ["sedes: no such key", "seeds"]),
        ({"train": {"epochs": 0}}, ["train.epochs: found 0"]),
    ],
)
def test_errors_name_the_key_and_what_was_expected(
    content: dict[str, Any], change: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read_comparison({**content, **change})
    for part in said:
        assert part in str(error.value)


def test_a_task_has_no_method_of_its_own(content: dict[str, Any]) -> None:
    content["tasks"]["red"]["method"] = "taps"
    with pytest.raises(ConfigError, match=r"tasks: .*'red' has a method of its own"):
        read_comparison(content)


def test_overrides_reach_a_file_and_only_a_file(config: Path, content: dict[str, Any]) -> None:
    changed = read_comparison(config, ["train.epochs=7", "methods=[linear_probe]", "seeds=2"])
    assert changed.train.epochs == 7
    assert [choice.name for choice in changed.methods] == ["linear_probe"]
    with pytest.raises(ConfigError, match="Overrides belong to a YAML file"):
        read_comparison(content, ["seeds=2"])
