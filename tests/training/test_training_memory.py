"""One task at a time: the same gradients, and the activations of one task in memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from training_nets import (
    assert_close,
    dense_net,
    everything,
    in_order,
    model_of,
    vectors,
)

import weft
from activations import saved_activations
from weft.core.adapter import Records
from weft.core.sharing import Penalty, Sharing
from weft.errors import DataError, PlanError

DOUBLE = torch.float64


def _fitted(plan_of, tasks: int, *, one_at_a_time: bool) -> tuple[weft.MultiTaskModel, object]:  # type: ignore[no-untyped-def]
    base = dense_net().double()
    names = [f"t{i}" for i in range(tasks)]
    model = model_of(base, plan_of(base), tasks=names)
    data = {t: in_order(vectors(24, 3, i, DOUBLE)) for i, t in enumerate(names)}
    history = weft.fit(model, data, epochs=3, lr=0.05, one_at_a_time=one_at_a_time, progress=False)
    return model, [[{**r, "seconds": 0} for r in history[t]] for t in names]


@pytest.mark.parametrize(
    "plan_of",
    [
        lambda base: weft.hard_sharing(base, own="top", fraction=0.4),
        lambda base: weft.taps(base, warmup=0, harden=0.0, joint=True),
        lambda base: weft.taps(base, warmup=0, harden=0.0),
    ],
    ids=["hard sharing", "joint TAPS", "TAPS"],
)
def test_one_at_a_time_computes_the_same(plan_of) -> None:  # type: ignore[no-untyped-def]
    together, rows = _fitted(plan_of, 3, one_at_a_time=False)
    alone, other = _fitted(plan_of, 3, one_at_a_time=True)
    assert_close(everything(together), everything(alone), 1e-12)
    for left, right in zip(rows, other, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a["loss"] == pytest.approx(b["loss"])
            assert a["penalty"] == pytest.approx(b["penalty"])


def _peak(tasks: int, *, one_at_a_time: bool) -> int:
    with saved_activations() as saved:
        _fitted(
            lambda base: weft.hard_sharing(base, own="top", fraction=0.4),
            tasks,
            one_at_a_time=one_at_a_time,
        )
    return saved.peak


def test_activations_do_not_grow_with_the_number_of_tasks() -> None:
    assert _peak(2, one_at_a_time=True) == _peak(8, one_at_a_time=True)
    assert _peak(8, one_at_a_time=False) > 3 * _peak(2, one_at_a_time=False)


def test_a_base_that_writes_to_its_input_is_refused_one_at_a_time_too() -> None:
    base = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4))
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 5))
    for name in "ab":
        model.add_task(name, weft.Classification(3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    for one_at_a_time in (False, True):
        with pytest.raises(DataError, match="The base writes to its input"):
            weft.fit(
                model,
                [(x.clone(), {"a": y, "b": y})],
                epochs=1,
                one_at_a_time=one_at_a_time,
                progress=False,
            )


class _Recorded(Penalty):
    needs_records = True

    def __call__(
        self,
        records: Mapping[str, Records],  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],  # noqa: ARG002
        shared: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        return torch.zeros((), dtype=DOUBLE)


def test_charges_for_records_need_all_tasks_at_once() -> None:
    def plan_of(base: nn.Module) -> Sharing:
        return Sharing("recording", patches=weft.bias_only(base).patches, penalties=(_Recorded(),))

    with pytest.raises(PlanError, match="charges all tasks of a step together"):
        _fitted(plan_of, 2, one_at_a_time=True)
