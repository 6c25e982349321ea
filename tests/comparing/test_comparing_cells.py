"""Cells: which there are, and names that change with everything that decides a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft.comparing import make_fleet, open_fleet, read_comparison, run_fleet
from weft.comparing.cells import Cell
from weft.comparing.fleet import part_of
from weft.comparing.locks import held
from weft.errors import ConfigError, DataError


def cells(content: dict[str, Any]) -> tuple[Cell, ...]:
    return make_fleet(read_comparison(content)).cells


def test_methods_that_train_shared_tensors_are_one_cell_for_all_tasks(
    content: dict[str, Any],
) -> None:
    found = [(c.tasks, c.label, c.seed) for c in cells({**content, "seeds": [3, 1]})]
    each = [
        (("bright",), "scale_bias"),
        (("red",), "scale_bias"),
        (("bright", "red"), "hard_sharing train.lr=0.02"),
    ]
    assert found == [(*cell, seed) for seed in (3, 1) for cell in each]


def test_a_method_may_be_limited_to_tasks_and_any_method_may_train_them_together(
    content: dict[str, Any],
) -> None:
    content["methods"] = [
        {"name": "taps", "tasks": ["red"]},
        {"name": "scale_bias", "train": {"joint": True}},
    ]
    assert [(c.tasks, c.joint) for c in cells(content)] == [
        (("red",), False),
        (("bright", "red"), True),
    ]
    content["methods"] = [{"name": "hard_sharing", "train": {"joint": False}}]
    with pytest.raises(ConfigError, match=r"train\.joint: found false, but 'hard_sharing'"):
        cells(content)


def test_names_are_readable_and_change_with_what_decides_the_result(
    content: dict[str, Any], tmp_path: Path
) -> None:
    def name(**changes: Any) -> str:
        return cells({**content, "methods": ["scale_bias"], **changes})[0].name

    first = name()
    assert first.startswith("bright-scale_bias-seed0-")
    assert name(output=str(tmp_path / "elsewhere")) == first
    assert name(methods=["linear_probe", "scale_bias"]) != first
    assert cells({**content, "methods": ["linear_probe", "scale_bias"]})[2].name == first
    others = [
        name(train={"epochs": 3, "lr": 0.05}),
        name(seed=1),
        name(seeds=[1]),
        name(data={"batch_size": 8}),
        name(base={**content["base"], "options": {"width": 8}}),
    ]
    net = tmp_path / "net.py"
    net.write_text(net.read_text() + "# changed\n")
    others.append(name())
    data = tmp_path / "bright.npz"
    data.write_bytes((tmp_path / "red.npz").read_bytes())
    others.append(name())
    assert len({first, *others}) == len(others) + 1


def test_shards_are_disjoint_and_together_everything(content: dict[str, Any]) -> None:
    every = cells({**content, "seeds": 3})
    parts = [part_of(every, (i, 4)) for i in (1, 2, 3, 4)]
    names = [cell.name for part in parts for cell in part]
    assert sorted(names) == sorted(cell.name for cell in every)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ((0, 2), (3, 2)):
        with pytest.raises(ConfigError, match="A shard is i/n"):
            part_of(every, wrong)


def test_a_folder_remembers_its_cells(content: dict[str, Any], tmp_path: Path) -> None:
    content["train"]["epochs"] = 1
    fleet = make_fleet(read_comparison(content))
    run_fleet(fleet, progress=False)
    opened = open_fleet(tmp_path / "run")
    assert opened.cells == fleet.cells
    (tmp_path / "run").rename(tmp_path / "moved")
    assert len(open_fleet(tmp_path / "moved").table()) == 4
    with pytest.raises(DataError, match="not the folder of a comparison"):
        open_fleet(tmp_path)


def test_a_lock_is_held_once_and_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "cell" / "lock"
    with held(path) as first, held(path) as second:
        assert (first, second) == (True, False)
    with held(path) as again:
        assert again
