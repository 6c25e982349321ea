"""Methods with options on every base, and the laws to run over them one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
from laws.cases import Case


@dataclass(frozen=True)
class Variant(Case):
    """A method with options on a base."""

    options: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        words = (f"{k}={v}" for k, v in self.options)
        return f"{super().__str__()}-{'-'.join(words)}"

    def plan(self, base: nn.Module) -> weft.Sharing:
        """The plan for a base."""
        return weft.method(self.method, base, **dict(self.options))


def variants(method: str, needs: str = "", **options: Any) -> list[Variant]:
    """A method with options on every base that has what it needs."""
    given = tuple(options.items())
    return [Variant(method, base, given) for base in BASES if not needs or needs in base.has]


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
