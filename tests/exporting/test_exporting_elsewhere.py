"""Files and folded modules are read where weft cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import BARE, HANDING, NOT_EXPORTED, SMALL, TIED, Case

from laws.cases import call
from weft.exporting import export
from weft.registry import METHODS

CASES = {
    **{m: Case(m, SMALL) for m in METHODS if m not in NOT_EXPORTED},
    "scale_bias without norms": Case("scale_bias", BARE),
    "blocks that are handed more": Case("adashare", HANDING),
    "tied": Case("full_finetune", TIED),
}
KINDS = ("pickled", "program", "state")


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float | str]:
    """By case and kind of file, how far what another process computes is from the model."""
    folder = tmp_path_factory.mktemp("exported")
    work, keys = [], []
    for name, case in CASES.items():
        torch.manual_seed(0)
        model = case.trained().eval()
        x = case.base.inputs(3)
        place = folder / name.replace(" ", "-")
        place.mkdir()
        with torch.no_grad():
            torch.save(((), x) if isinstance(x, dict) else ((x,), {}), place / "inputs")
            torch.save(model(x, task="a"), place / "outputs")
            torch.save(call(model.view("a"), x), place / "features")
        torch.save(model.fold("a"), place / "pickled")
        export(model, "a", place / "program.pt2", format="torch")
        export(model, "a", place / "state", format="safetensors", head=False)
        for kind, file in zip(KINDS, ("pickled", "program.pt2", "state"), strict=True):
            outputs = "outputs" if kind == "program" else "features"
            files = {"file": file, "inputs": "inputs", "outputs": outputs}
            paths = {key: str(place / value) for key, value in files.items()}
            work.append({"kind": kind, "net": type(model.base).__name__, **paths})
            keys.append((name, kind))
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(keys, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_another_process_computes_the_same_without_weft(differences, name: str, kind: str) -> None:
    found = differences[name, kind]
    assert isinstance(found, float), found
    assert found <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_no_module_of_a_folded_network_is_of_weft(name: str) -> None:
    folded = CASES[name].trained().fold("a")
    assert not [m for m in folded.modules() if type(m).__module__.startswith("weft")]
