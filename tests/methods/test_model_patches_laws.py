"""The laws for model patches with options: inserted scales and shifts, and a base that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from laws.cases import assert_close, call, disturb, features
from laws.variants import GRAPHS, ISOLATED, LAWS, OF_PATCHES, THREADS, Variant, name_of, variants
from weft.core.sites import canonical_names

# The others hold attention or recurrent layers only.
INSERTED = [
    case
    for case in variants("scale_bias", "layer", where="layers")
    if case.base.name not in ("attention", "recurrent")
]
JOINT = [
    *variants("scale_bias", "norm", train_base=True),
    *variants("depthwise_patch", "depthwise", scale_bias=False, train_base=True),
]
inserted = pytest.mark.parametrize("case", INSERTED, ids=str)


@pytest.mark.parametrize("law", LAWS, ids=name_of)
@inserted
def test_inserted_scales_and_shifts_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)


@pytest.mark.parametrize("law", [w for w in LAWS if w not in ISOLATED] + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize("case", JOINT, ids=str)
def test_a_base_that_trains_keeps_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)


@pytest.mark.parametrize("law", THREADS + GRAPHS, ids=name_of)
@pytest.mark.parametrize(
    "case", [c for c in INSERTED if c.base.name in ("convolutions", "tied")], ids=str
)
def test_inserted_scales_and_shifts_run_in_threads_and_graphs(
    case: Variant, law: Callable[..., None]
) -> None:
    law(case)


# ------------------------------------------------- what laws 3, 5, 6 and 8 say of an insertion


def composed(model: weft.MultiTaskModel, case: Variant, task: str, x: object) -> Tensor:
    """The oracle: the base with a hook at every site that scales and shifts, then the head."""
    base, own = copy.deepcopy(model.base).eval(), model.tasks[task].own
    for site in model.sharing.adapters:

        def affine(module: nn.Module, _: Any, y: Tensor, site: str = site) -> Tensor:
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            moved = y.movedim(axis, -1) * own[f"{site}:scale"] + own[f"{site}:shift"]
            return moved.movedim(-1, axis)

        base.get_submodule(site).register_forward_hook(affine)
    return model.head(task)(features(call(base, x), case.base))


@inserted
def test_all_paths_of_an_insertion_agree(case: Variant) -> None:
    model = case.trained().eval()
    x = case.base.inputs(4)
    with torch.no_grad():
        everything = model.predict_all(x)
        for task in model.task_names:
            head, expected = model.head(task), composed(model, case, task, x)
            assert_close(model(x, task=task), expected)
            assert_close(everything[task], expected)
            assert_close(head(features(call(model.view(task), x), case.base)), expected)
            assert_close(head(features(call(model.fold(task), x), case.base)), expected, 2e-5)


@inserted
def test_a_folded_insertion_is_the_bases_class_with_biases_where_it_had_none(
    case: Variant,
) -> None:
    base = case.base.make()
    model = case.trained(base)
    folded = model.fold("a")
    assert [type(m) for m in folded.modules()] == [type(m) for m in base.modules()]
    new = {f"{site}.bias" for site in model.sharing.adapters} - base.state_dict().keys()
    assert folded.state_dict().keys() == base.state_dict().keys() | new
    names = canonical_names(base)
    found = folded.state_dict(keep_vars=True)
    assert all(found[name] is found[first] for name, first in names.items() if name in found)


@inserted
def test_an_insertion_owns_two_numbers_per_output_channel(case: Variant) -> None:
    model = case.model()
    modules = dict(model.base.named_modules())
    channels = [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for m in map(modules.__getitem__, model.sharing.adapters)
    ]
    ledger = model.ledger("a")
    assert ledger.own_parameters == 2 * sum(channels)
    assert ledger.own_buffers == 0


@inserted
def test_an_insertion_is_stored_and_loaded_bit_for_bit(case: Variant, tmp_path: Path) -> None:
    base = case.base.make()
    model = case.trained(base).eval()
    weft.Bank(tmp_path).save(model)
    loaded = weft.Bank(tmp_path).load(base).eval()
    x = case.base.inputs(3)
    with torch.no_grad():
        for task in model.task_names:
            assert torch.equal(loaded(x, task=task), model(x, task=task))
            assert loaded.ledger(task) == model.ledger(task)


@inserted
def test_an_insertion_goes_through_a_copy(case: Variant) -> None:
    model = case.trained().eval()
    again = copy.deepcopy(model)
    x = case.base.inputs(2)
    with torch.no_grad():
        expected = model(x, task="b")
        disturb(model)
        assert torch.equal(again(x, task="b"), expected)
