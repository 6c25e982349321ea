"""What merging refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import batches, make_base, model_of

import weft
from weft.errors import ConfigError, DataError, TaskError
from weft.merging import concrete, merge

NAN = float("nan")
DATA = {"t0": batches(0), "t1": batches(1), "t2": batches(2)}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"how": "task_arithmetics"}, ConfigError, "Close matches: task_arithmetic"),
        ({"how": None}, ConfigError, "'ties' or 'concrete', found None"),
        ({"density": 0.0}, ConfigError, r"density=...\) is a number in \(0, 1\], found 0.0"),
        ({"density": "x"}, ConfigError, r"density=...\).*found 'x'"),
        ({"density": NAN}, ConfigError, r"density=...\).*found nan"),
        ({"density": True}, ConfigError, r"density=...\).*found True"),
        ({"scale": NAN}, ConfigError, "a finite number or 'choose', found nan"),
        ({"scale": float("inf")}, ConfigError, "a finite number or 'choose', found inf"),
        ({"scale": "best"}, ConfigError, "a finite number or 'choose', found 'best'"),
        ({"scale": [0.1]}, ConfigError, r"a finite number or 'choose', found \[0.1\]"),
        ({"scale": True}, ConfigError, "a finite number or 'choose', found True"),
        ({"scales": "x"}, ConfigError, "a list of finite numbers, found 'x'"),
        ({"scales": 3}, ConfigError, "a list of finite numbers, found 3"),
        ({"scales": []}, ConfigError, r"a list of finite numbers, found \[\]"),
        ({"scales": [0.1, "x"]}, ConfigError, r"merge\(scales=...\).*found \[0.1, 'x'\]"),
        ({"scales": [0.1, NAN]}, ConfigError, r"merge\(scales=...\).*found \[0.1, nan\]"),
        ({"scale": "choose"}, DataError, r"a dict of batches by task, found None"),
        ({"data": "x"}, DataError, "a dict of batches by task, found an object of type str"),
        ({"data": {"t0": [], "t1": []}}, DataError, "no data of 't2', found data of t0, t1"),
        ({"data": {**DATA, "t2": 3}}, DataError, "'t2' an object of type int"),
        ({"tasks": ["t0", "t9"]}, TaskError, "no task 't9'.*Close matches: t"),
        ({"tasks": ["t0", "t0"]}, TaskError, "twice"),
        ({"tasks": []}, TaskError, "Name some of: t0, t1, t2"),
        ({"tasks": "t9"}, TaskError, "no task 't9'"),
        ({"tasks": [0, 1]}, TaskError, "named by strings, found 0"),
        ({"tasks": 3}, TaskError, "object of type int"),
        ({"density": 0.2}, ConfigError, "is for how='ties'; 'task_arithmetic' keeps every entry"),
        ({"scales": [0.1]}, ConfigError, "here the scale is 0.3. Give scale='choose' and data="),
        ({"how": None}, ConfigError, r"how=...\) is .*, found None\.$"),
        ({"base": make_base()}, ConfigError, "base=.*belongs to a bank"),
        ({"how": "concrete"}, DataError, "a dict of batches by task, found None"),
        ({"how": "concrete", "data": DATA, "scale": 0.3}, ConfigError, "scale: .*merging.concrete"),
        ({"how": "concrete", "data": DATA, "density": 0.2}, ConfigError, "no use for density"),
        ({"how": "concrete", "data": DATA, "scales": [1]}, ConfigError, "no use for scales"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        merge(model_of(), **options)


POSITIVE = ["temperature", "lr", "inner_lr", "scale_lr"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        *(
            ({name: value}, ConfigError, rf"concrete\({name}=...\) is a positive number, found")
            for name in POSITIVE
            for value in (0, -1.0, NAN, "x", None, True)
        ),
        *(
            ({name: value}, ConfigError, rf"concrete\({name}=...\) is a whole number of at least 1")
            for name in ("steps", "scale_steps")
            for value in (0, 2.5, "x", None, True)
        ),
        ({"seed": 2**70}, ConfigError, r"seed=...\) is a whole number of 64 bits, found 118"),
        ({"scale": NAN}, ConfigError, r"scale=...\) is a finite number, found nan"),
        ({"scale": "choose"}, ConfigError, r"scale=...\) is a finite number, found 'choose'"),
        ({"diversity": -1}, ConfigError, r"diversity=...\) is a number >= 0, found -1"),
        ({"hard": "no"}, ConfigError, r"hard=...\) is True or False, found 'no'"),
        ({"masked": None}, ConfigError, r"masked=...\) is True or False, found None"),
        ({"clamp": 1}, ConfigError, r"clamp=...\) is True or False, found 1"),
        ({"form": "layerwise"}, ConfigError, "found 'layerwise'. Close matches: layer_wise"),
        ({"data": None}, DataError, "a dict of batches by task, found None"),
        ({"data": batches()}, DataError, "a dict of batches by task, found an object of type list"),
        ({"data": {}}, DataError, "no data of 't0', found data of no task"),
        ({"data": {"t00": []}}, DataError, "no data of 't0'.*Close matches: t00"),
        ({"data": {"t0": torch.zeros(4, 6)}}, DataError, "'t0' an object of type Tensor"),
        ({"data": {"t0": None}}, DataError, "'t0' None"),
        ({"tasks": [0]}, TaskError, "named by strings, found 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_concrete_are_refused(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        concrete(model_of(1), **{"data": DATA, "tasks": ["t0"], "progress": False, **options})


@pytest.mark.parametrize("options", [{}, {"how": "ties"}, {"how": "concrete", "data": DATA}])
def test_a_bank_needs_its_base(tmp_path: Path, options: dict[str, Any]) -> None:
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model_of(2))
    with pytest.raises(ConfigError, match=r"needs base=, .* found none"):
        weft.merge(bank, ["t0", "t1"], **options)
    with pytest.raises(ConfigError, match=r"needs base=, .* object of type str"):
        weft.merge(bank, base="resnet18", **options)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"no task 't9'.*Tasks: t0, t1"):
        weft.merge(bank, ["t9"], base=make_base(), **options)


@pytest.mark.parametrize("source", [None, "bank", make_base()])
def test_what_holds_no_tasks_is_refused(source: Any) -> None:
    found = type(source).__name__
    with pytest.raises(ConfigError, match=rf"weft.MultiTaskModel or a weft.Bank, found {found}"):
        merge(source)
    with pytest.raises(ConfigError, match=rf"weft.MultiTaskModel or a weft.Bank, found {found}"):
        concrete(source, DATA)


def test_whole_numbers_and_numpy_numbers_are_numbers() -> None:
    assert merge(model_of(2), scale=1).scale == 1.0
    found = merge(model_of(2), data=DATA, scales=np.linspace(0.2, 0.4, 2))
    assert list(found.scores) == [0.2, 0.4]
    concrete(model_of(1), DATA, steps=np.int64(1), lr=np.float32(0.1), progress=False)
