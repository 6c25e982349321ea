"""Plans: created shared tensors, a plan per task, penalties, tied names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import NO_HEAD, conv_net, mlp, model_of, vectors
from weft.core.adapter import Records
from weft.core.patch import Patch, Replace
from weft.core.sharing import Created, Group, Penalty, Phase
from weft.errors import PlanError


@dataclass(frozen=True)
class Mixture(Patch):
    """The tensor is a mixture of shared basis tensors by the task's own weights."""

    basis: str

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}:mix",)

    def init(self, name: str, _: Tensor) -> dict[str, Tensor]:
        return {f"{name}:mix": nn.Parameter(torch.full((2,), 0.5))}

    def compose(self, name: str, _: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.einsum("k,k...->...", tensors[f"{name}:mix"], tensors[self.basis])

    def harden(
        self, name: str, _: Tensor, tensors: Mapping[str, Tensor]
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        assert self.basis in tensors
        return self, {f"{name}:mix": tensors[f"{name}:mix"]}


@dataclass(frozen=True)
class Spread(Penalty):
    """The spread of the tasks' weights: pools over tasks."""

    key: str

    def __call__(
        self,
        _records: Mapping[str, Records],
        own: Mapping[str, Mapping[str, Tensor]],
        _shared: Mapping[str, Tensor],
    ) -> Tensor:
        return torch.stack([o[self.key] for o in own.values()]).var(0, unbiased=False).sum()


def mixed(base: nn.Module, *, trains: bool = True) -> weft.Sharing:
    basis = Created(torch.randn(2, *base[3].weight.shape), trains=trains)
    return weft.Sharing(
        "mixture",
        patches={"3.weight": Mixture("basis.of.3")},
        created={"basis.of.3": basis},
        penalties=(Spread("3.weight:mix"),),
    )


def test_created_tensors_are_shared_and_train() -> None:
    base = mlp()
    model = model_of(base, mixed(base))
    assert set(model.shared_trainable()) == {"basis.of.3"}
    step = model.step({"a": vectors(), "b": vectors()})
    sum(o.sum() for o in step.outputs.values()).backward()
    assert model.shared["basis.of.3"].grad is not None
    assert all(p.grad is not None for t in "ab" for p in model.trainable(t).values())
    assert model.ledger("a").own_parameters == 2
    x = vectors()
    before = model.eval()(x, task="a")
    model.harden("a")
    assert torch.equal(model(x, task="a"), before)
    assert torch.equal(model.fold("a")(x), before)
    assert "shared.basis/of/3" in model.state_dict()


def test_models_copy_created_tensors_and_may_freeze_them() -> None:
    base = mlp()
    plan = mixed(base, trains=False)
    one, two = model_of(base, plan), model_of(base, plan)
    assert not one.shared_trainable()
    one.shared["basis.of.3"].zero_()
    assert bool(two.shared["basis.of.3"].any())
    assert bool(plan.created["basis.of.3"].value.any())


def test_a_created_tensor_may_not_take_the_name_of_another() -> None:
    base = mlp()
    plan = weft.Sharing("clash", created={"0.weight": Created(torch.zeros(2))})
    with pytest.raises(PlanError, match=r"creates '0.weight', which is a tensor of the base"):
        model_of(base, plan)


def test_penalties_pool_over_the_tasks_of_equal_plans() -> None:
    base = mlp()
    model = model_of(base, mixed(base))
    with torch.no_grad():
        model.tasks["a"].own["3.weight:mix"].copy_(torch.tensor([1.0, 0.0]))
        model.tasks["b"].own["3.weight:mix"].copy_(torch.tensor([0.0, 0.0]))
    batches = {"a": vectors(), "b": vectors()}
    assert float(model.step(batches).penalty.detach()) == pytest.approx(0.25)
    assert float(model.step(batches, charge={"b": 3.0}).penalty.detach()) == pytest.approx(0.75)
    assert float(model.step(batches, charge={"a": 0.0}).penalty.detach()) == 0.0
    assert float(model.penalty("a").detach()) == 0.0
    # A task whose plan was made anew, for instance by loading it, is charged with the others.
    model.tasks["b"].sharing = pickle.loads(pickle.dumps(model.plan("b")))
    assert float(model.step(batches).penalty.detach()) == pytest.approx(0.25)


def test_plans_of_different_prices_are_charged_apart() -> None:
    base = mlp()
    model = weft.MultiTaskModel(base, weft.taps(base, penalty=1.0))
    model.add_task("a", NO_HEAD)
    model.add_task("b", NO_HEAD, sharing=weft.taps(base, penalty=10.0))
    model.add_task("c", NO_HEAD, sharing=weft.linear_probe(base))
    batches = {t: vectors() for t in "abc"}
    assert float(model.step(batches).penalty.detach()) == pytest.approx(0.15 * 11)
    assert float(model.step(batches, charge={"b": 0.0}).penalty.detach()) == pytest.approx(0.15)
    assert float(model.penalty("c")) == 0.0
    assert model.penalty("c").is_floating_point()


# --------------------------------------------------------------------------- plan per task


def test_tasks_may_have_plans_of_their_own() -> None:
    base = conv_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base)).eval()
    plans = {m: weft.method(m, base) for m in ("taps", "scale_bias", "full_finetune", "bias_only")}
    for name, plan in plans.items():
        model.add_task(name, NO_HEAD, sharing=plan)
    x = torch.randn(4, 3, 8, 8)
    assert all(torch.equal(o, base.eval()(x)) for o in model.predict_all(x).values())
    assert [model.plan(t).method for t in model.task_names] == list(plans)
    model(x, task=list(plans))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.plan("taps") is again.tasks["taps"].sharing
        assert [again.plan(t).method for t in again.task_names] == list(plans)


def test_a_plan_per_task_may_not_touch_shared_tensors() -> None:
    base = mlp()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for plan in (weft.hard_sharing(base), mixed(base)):
        with pytest.raises(PlanError, match=rf"'{plan.method}' creates or trains shared tensors"):
            model.add_task("a", NO_HEAD, sharing=plan)
    assert model.task_names == ()


def test_a_plan_per_task_that_needs_a_frozen_base_is_refused_over_a_training_one() -> None:
    base = mlp()
    model = weft.MultiTaskModel(base, weft.hard_sharing(base))
    with pytest.raises(PlanError, match=r"only right over a frozen base.*Use the residual form"):
        model.add_task("a", NO_HEAD, sharing=weft.taps(base))
    model.add_task("a", NO_HEAD, sharing=weft.taps(base, form="residual"))
    trained = frozenset(weft.taps(base).patches)
    with pytest.raises(PlanError, match="only right over a frozen base"):
        weft.MultiTaskModel(base, replace(weft.taps(base), train_shared=trained))


def test_a_plan_per_task_must_fit_the_base() -> None:
    model = weft.MultiTaskModel(mlp(), weft.linear_probe(mlp()))
    wrong = weft.Sharing("wrong", patches={"0.wieght": Replace()})
    with pytest.raises(PlanError, match=r"'0.wieght' is not in the base. Close matches: 0.weight"):
        model.add_task("a", NO_HEAD, sharing=wrong)


def test_tied_tensors_go_by_their_first_name() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    for plan in (
        weft.Sharing("second", patches={"1.weight": Replace()}),
        weft.Sharing("second", train_shared=frozenset({"1.weight"})),
    ):
        with pytest.raises(PlanError, match=r"'1.weight' is tied to '0.weight'; use that name"):
            model_of(base, plan)


# ------------------------------------------------------------------------------- the data


def test_plans_are_frozen_and_go_through_pickle() -> None:
    plan = weft.taps(conv_net(), penalty=0.7)
    with pytest.raises(TypeError):
        plan.patches["0.weight"] = Replace()  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.method = "other"  # type: ignore[misc]
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), replace(plan)):
        assert (again.method, dict(again.options)) == (plan.method, dict(plan.options))
        assert dict(again.patches) == dict(plan.patches)
        assert (again.penalties, again.phases, again.groups) == (
            plan.penalties,
            plan.phases,
            plan.groups,
        )


def test_phases_and_groups_match_by_pattern() -> None:
    phase = Phase("still", freeze=("*:score", "head.*"))
    assert not phase.trains("layer1.conv:score")
    assert phase.trains("layer1.conv.weight:tuned")
    group = Group(match=("*.bias",), lr=2.0)
    assert group.takes("0.bias")
    assert not group.takes("0.weight")
