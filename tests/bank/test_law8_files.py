"""Law 8, for every method: save and load is bit-exact, and the file size follows the ledger."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import weft
from bank.banking import assert_same_model
from laws.cases import TINY, Case, Law, assert_same_bits, cases, snapshot
from weft.bank import Bank
from weft.core.ledger import gate_scores


@cases(Law.FILES_ARE_EXACT, TINY)
def test_law8_save_and_load_is_bit_exact(case: Case, tmp_path: Path) -> None:
    base = case.base.make()
    model = case.trained(base)
    model.tasks["a"].facts["metrics"] = {"val": {"accuracy": 1 / 3}, "epochs": [1, 2]}
    before, base_before = snapshot(model), snapshot(base)
    bank = Bank(tmp_path / "bank")
    bank.save(model)
    assert_same_bits(before, snapshot(model))
    assert not bank.verify(base)

    state = torch.get_rng_state()
    loaded = Bank(tmp_path / "bank").load(copy.deepcopy(base))
    assert torch.equal(state, torch.get_rng_state())
    assert_same_model(loaded, model, case.base.inputs(4))
    for name in model.task_names:
        held = model.tasks[name]
        scores = {**held.scores, **gate_scores(held.patches, held.own)}
        assert loaded.tasks[name].scores == scores
        # What is stored is what `harden` leaves.
        model.harden(name)
        found = loaded.tasks[name].own
        assert_same_bits(snapshot(found), snapshot(model.tasks[name].own))
        for key, tensor in model.tasks[name].own.items():
            assert type(found[key]) is type(tensor)
            assert found[key].requires_grad == tensor.requires_grad
    assert_same_bits(base_before, snapshot(base))


@cases(Law.FILES_ARE_EXACT, TINY[:2])
def test_law8_file_size_follows_the_ledger(case: Case, tmp_path: Path) -> None:
    model = case.trained()
    bank = Bank(tmp_path)
    bank.save(model)
    for name in model.task_names:
        folder = tmp_path / "tasks" / name
        ledger = model.ledger(name)
        assert bank.ledger(name) == ledger
        for file, size in (("own", ledger.own_bytes), ("head", ledger.head_bytes)):
            path = folder / f"{file}.safetensors"
            length = int.from_bytes(path.read_bytes()[:8], "little")
            tensors = len(bank.info(name)[file]["tensors"])
            assert path.stat().st_size == size + 8 + length
            assert length <= 128 * tensors + 16


@cases(Law.FILES_ARE_EXACT, TINY[:1])
def test_law8_a_loaded_task_trains_and_is_saved_again(case: Case, tmp_path: Path) -> None:
    base = case.base.make()
    model = case.trained(base)
    bank = Bank(tmp_path)
    bank.save(model)
    loaded = bank.load(base, sharing=weft.method(case.method, base))
    x = case.base.inputs(4)
    assert loaded.plan("a") is loaded.sharing
    step = loaded.step({"a": x})
    (step.outputs["a"].sum() + step.penalty).backward()
    with torch.no_grad():
        for parameter in loaded.task_parameters("a"):
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    bank.save(loaded, "a")
    shared = bank.info("a")["shared"]
    again = bank.load(base, "a")
    assert torch.equal(again.eval()(x, task="a"), loaded.eval()(x, task="a"))
    assert shared == bank.info("b")["shared"] or loaded.sharing.trains_shared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["taps", "full_finetune", "hard_sharing"])
def test_law8_types_survive(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from bank.banking import make_base, make_model

    base = make_base()
    model = make_model(base, method=method).to(dtype)
    bank = Bank(tmp_path)
    bank.save(model)
    assert_same_model(bank.load(make_base().to(dtype)), model, torch.randn(2, 3, 8, 8, dtype=dtype))
    with pytest.raises(weft.WeftError, match="other shapes or types"):
        bank.load(make_base())
