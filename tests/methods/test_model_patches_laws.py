"""The laws for model patches with options: inserted scales and shifts, and a base that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from laws import (
    test_law1_fresh,
    test_law2_isolated,
    test_law3_paths,
    test_law4_gradients,
    test_law5_ties_and_statistics,
    test_law6_ledger,
    test_law7_threads_and_graphs,
)
from laws.bases import BASES
from laws.cases import Case, assert_close, call, disturb, features
from weft.core.sites import canonical_names
from weft.registry import Law


@dataclass(frozen=True)
class Variant(Case):
    """A method with options on a base."""

    options: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        return f"{super().__str__()}-{'-'.join(k for k, _ in self.options)}"

    def plan(self, base: nn.Module) -> weft.Sharing:
        """The plan for a base."""
        return weft.method(self.method, base, **dict(self.options))

    def model(self, base: nn.Module | None = None, **tasks: weft.Task) -> weft.MultiTaskModel:
        base = self.base.make() if base is None else base
        example, output = self.base.inputs(2), self.base.output
        model = weft.MultiTaskModel(base, self.plan(base), example=example, output=output)
        three = {"a": weft.Classification(3), "b": weft.Classification(3), "c": weft.Regression()}
        for name, task in (tasks or three).items():
            model.add_task(name, task)
        return model

    def excepted(self, law: Law) -> bool:
        return law is Law.TASKS_ARE_ISOLATED and ("train_base", True) in self.options


def variants(method: str, needs: str, **options: Any) -> list[Variant]:
    """A method with options on every base that has what it needs."""
    given = tuple(options.items())
    return [Variant(method, base, given) for base in BASES if needs in base.has]


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

LAWS = [
    test_law1_fresh.test_fresh_task_is_the_base,
    test_law1_fresh.test_fresh_task_in_grad_mode_is_the_base_in_grad_mode,
    test_law2_isolated.test_training_one_task_changes_no_bit_of_the_others,
    test_law2_isolated.test_training_a_task_changes_its_outputs,
    test_law2_isolated.test_a_joint_step_gives_each_task_what_it_gets_alone,
    test_law3_paths.test_each_row_of_a_mixed_batch_is_its_tasks,
    test_law3_paths.test_hardening_changes_no_output_and_files_nothing_for_closed_gates,
    test_law4_gradients.test_gradients_reach_exactly_the_trainable_set,
    test_law4_gradients.test_every_shared_tensor_that_trains_is_reached_by_some_task,
    test_law4_gradients.test_inference_leaves_no_graph,
    test_law5_ties_and_statistics.test_only_statistics_that_the_plan_trains_move,
    test_law6_ledger.test_ledger_counts_what_hardening_keeps,
    test_law6_ledger.test_a_models_memory_follows_its_ledgers,
]
# These read the base's tensors at their old places, which an insertion moves.
OF_PATCHES = [
    test_law3_paths.test_all_paths_agree,
    test_law3_paths.test_fold_has_the_class_keys_and_ties_of_the_base,
    test_law5_ties_and_statistics.test_tied_tensors_stay_tied,
    test_law5_ties_and_statistics.test_modules_with_frozen_statistics_stay_in_eval_mode,
]
ISOLATED = (LAWS[2], LAWS[4])  # not where the base trains with every task
THREADS = [
    test_law7_threads_and_graphs.test_two_threads_on_two_tasks_agree_with_one,
    test_law7_threads_and_graphs.test_two_threads_train_two_tasks_as_one_does,
]
GRAPHS = [
    test_law7_threads_and_graphs.test_two_tasks_share_one_compiled_graph,
    test_law7_threads_and_graphs.test_an_exported_view_agrees,
]


def name_of(law: Callable[[Case], None]) -> str:
    return law.__name__.removeprefix("test_")


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
