"""AdaShare: the mixture, skipping, what policies are charged, and the course of training."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from methods.residual_nets import (
    BLOCKS,
    NO_HEAD,
    SHORTCUTS,
    choose,
    images,
    learn,
    model_of,
    net,
    same,
    snapshot,
)
from weft.adapters import BlockPolicy
from weft.core.sharing import Sharing
from weft.errors import PlanError
from weft.methods.policy_course import FixPolicies, LearnPolicies
from weft.penalties import PolicySharing, PolicySparsity
from weft.training.history import Epoch


def plan_of(base: nn.Module, **options: Any) -> Sharing:
    return weft.adashare(base, blocks=SHORTCUTS, **options)


def by_hand(base: nn.Module, x: Tensor, shares: list[Any]) -> Tensor:
    """The mixture u f + (1 - u) r written out, block by block."""
    x = base.stem(x)
    for block, u in zip(base.blocks, shares, strict=True):
        around = x if block.down is None else block.down(x)
        executed = (around + block.norm(block.conv(x))).relu()
        x = u * executed + (1 - u) * around
    return x.mean((2, 3))


# ------------------------------------------------------------------------------- running


@pytest.mark.parametrize("training", [True, False])
def test_executing_everything_is_the_plain_network_bit_for_bit(training: bool) -> None:
    base = net().train(training)
    model = model_of(copy.deepcopy(base), plan_of(base)).train(training)
    x = images()
    found, expected = model(x, task="a"), base(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    shared = model.shared_trainable()
    for name, parameter in base.named_parameters():
        assert torch.equal(shared[name].grad, parameter.grad), name
    for name, buffer in base.named_buffers():
        assert torch.equal(model.base.get_buffer(name), buffer), name  # statistics moved alike


@pytest.mark.parametrize("execute", ["0000", "0101", "1011", "0010"])
@pytest.mark.parametrize("training", [True, False])
def test_a_skipped_block_is_not_run(execute: str, training: bool) -> None:
    base = net()
    model = model_of(base, plan_of(base)).train(training)
    choose(model, "a", execute)
    x = images()
    expected = by_hand(copy.deepcopy(model.base).train(training), x, [int(u) for u in execute])
    view = model.view("a")
    calls = [view.structure.get_submodule(site).inner.rows for site in BLOCKS]
    for rows in calls:
        rows.clear()
    assert torch.allclose(view(x), expected, atol=1e-6)
    assert [len(rows) for rows in calls] == [int(u) for u in execute]


def test_the_mixture_is_the_formula_and_its_gradients() -> None:
    base = net()
    model = model_of(base, plan_of(base)).train()
    learn(model)
    x = images()
    torch.manual_seed(7)
    found = model(x, task="a")
    own = model.tasks["a"].own
    logits = {b: own[f"{b}:logits"].detach().clone().requires_grad_() for b in BLOCKS}
    plain = copy.deepcopy(base).train()
    torch.manual_seed(7)
    shares = [nn.functional.gumbel_softmax(logits[b], tau=1.0)[0] for b in BLOCKS]
    assert torch.allclose(found, by_hand(plain, x, shares), atol=1e-6)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    torch.manual_seed(7)
    shares = [nn.functional.gumbel_softmax(logits[b], tau=1.0)[0] for b in BLOCKS]
    (by_hand(copy.deepcopy(base).train(), x, shares) * direction).sum().backward()
    for block in BLOCKS:
        gradient = own[f"{block}:logits"].grad
        assert torch.allclose(gradient, logits[block].grad, atol=1e-5)
        assert gradient.any()  # also where a block is nearly skipped


def test_gradients_reach_the_logits_of_blocks_that_are_nearly_skipped() -> None:
    base = net()
    model = model_of(base, plan_of(base)).train()
    learn(model, temperature=2.0)
    with torch.no_grad():
        for block in BLOCKS:
            model.tasks["a"].own[f"{block}:logits"].copy_(torch.tensor([-3.0, 3.0]))
    model(images(), task="a").square().sum().backward()
    assert all(model.tasks["a"].own[f"{b}:logits"].grad.any() for b in BLOCKS)


def test_a_sample_is_one_per_task_and_forward() -> None:
    base = net()
    model = model_of(base, plan_of(base)).train()
    learn(model)
    x = images(4)
    torch.manual_seed(1)
    one = model.step({"a": x, "b": x}).outputs
    assert not torch.allclose(one["a"], one["b"])
    assert not torch.allclose(model(x, task="a"), model(x, task="a"))
    eval_twice = model.eval()(x, task="a"), model(x, task="a")
    assert torch.equal(*eval_twice)


@pytest.mark.parametrize("execute", ["1111", "0000"])
def test_statistics_of_a_shortcut_are_updated_once(execute: str) -> None:
    base = net()
    for learned in (True, False):
        model = model_of(base, plan_of(base)).train()
        choose(model, "a", execute)
        if learned:
            learn(model)
        before = snapshot(model.base)
        model(images(), task="a")
        down, branch = "blocks.1.down.1", "blocks.1.norm"
        after = snapshot(model.base)
        counts = [
            int(after[f"{n}.num_batches_tracked"] - before[f"{n}.num_batches_tracked"])
            for n in (down, branch)
        ]
        assert counts == [1, 1 if learned else int(execute[1])]
        assert same(snapshot(base), before)  # the user's own base stays as it was


def test_evaluation_while_a_policy_is_learned() -> None:
    base = net()
    model = model_of(base, plan_of(base)).eval()
    learn(model)
    own = model.tasks["a"].own
    with torch.no_grad():
        for block, logit in zip(BLOCKS, (1.0, -1.0, 0.0, -0.1), strict=True):
            own[f"{block}:logits"][0] = logit
        x = images()
        expected = by_hand(model.base, x, [1, 0, 1, 0])  # p >= 1/2 executes
        assert torch.allclose(model(x, task="a"), expected, atol=1e-6)
        assert torch.allclose(model.fold("a")(x), expected, atol=1e-6)
    drawn = model_of(base, plan_of(base, evaluation="sample"), "a").eval()
    learn(drawn)
    with torch.no_grad():
        outputs = {tuple(drawn(x, task="a").flatten().tolist()) for _ in range(40)}
    assert len(outputs) > 4
    with pytest.raises(PlanError, match="drawn anew in each forward has no plain form"):
        drawn.fold("a")


def test_folding_gives_a_smaller_plain_network() -> None:
    base = net()
    model = model_of(base, plan_of(base)).eval()
    choose(model, "a", "0010")
    x = images()
    with torch.no_grad():
        expected = model(x, task="a")
        folded = model.fold("a")
        assert torch.allclose(folded(x), expected, atol=1e-6)
        assert torch.allclose(model.fold("b")(x), base.eval()(x), atol=1e-6)
    kinds = [type(m) for m in folded.blocks]
    assert kinds == [nn.Identity, nn.Sequential, type(base.blocks[2]), nn.Identity]
    left = sum(p.numel() for p in folded.parameters())
    gone = [base.blocks[0], base.blocks[3], base.blocks[1].conv, base.blocks[1].norm]
    everything = sum(p.numel() for p in base.parameters())
    assert left == everything - sum(p.numel() for m in gone for p in m.parameters())
    assert not any("weft" in type(m).__module__ for m in folded.modules())


def test_a_compiled_view_is_one_graph_for_all_policies() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    base = net()
    model = model_of(base, plan_of(base), "a", "b", "c").eval()
    choose(model, "b", "0101")
    learn_only = model.tasks["c"].own
    for block in BLOCKS:
        learn_only[f"{block}:temperature"].fill_(1.0)
    counter = CompileCounterWithBackend("eager")
    view = model.view("a")
    compiled = torch.compile(view, backend=counter, fullgraph=True)
    x = images()
    with torch.no_grad():
        for task in model.task_names:
            view.bind(dict(model.tensors(task)))
            assert torch.allclose(compiled(x), model(x, task=task), atol=1e-6)
        program = torch.export.export(model.view("b"), (x,))
        assert torch.allclose(program.module()(x), model(x, task="b"), atol=1e-6)
    assert counter.frame_count <= 2


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    base = net()
    model = model_of(base, plan_of(base, batchnorm="private")).eval()
    choose(model, "a", "0110")
    weft.Bank(tmp_path).save(model)
    loaded = weft.Bank(tmp_path).load(base).eval()
    x = images()
    with torch.no_grad():
        for task in "ab":
            assert torch.equal(loaded(x, task=task), model(x, task=task))
            assert loaded.ledger(task) == model.ledger(task)
    again = weft.Bank(tmp_path).load(base, sharing=plan_of(base, batchnorm="private"))
    assert again.sharing.penalties
    assert dict(again.sharing.adapters) == dict(model.sharing.adapters)


def test_private_batchnorm_is_owned_and_the_rest_is_shared() -> None:
    base = net()
    plan = plan_of(base, batchnorm="private")
    assert set(plan.patches) == set(weft.scale_bias(base).patches)
    assert not plan.train_shared & plan.patches.keys()
    assert plan.train_shared | plan.patches.keys() == set(weft.full_finetune(base).patches)
    assert plan_of(base).train_shared == set(weft.full_finetune(base).patches)


# ------------------------------------------------------------------------------- charges


def numbers(model: weft.MultiTaskModel, tau: list[float]) -> np.ndarray:
    """Random logits (tasks, blocks, 2) written into a model, and temperatures by block."""
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(len(model.task_names), 4, 2)).astype(np.float32)
    for k, task in enumerate(model.task_names):
        for i, block in enumerate(BLOCKS):
            own = model.tasks[task].own
            with torch.no_grad():
                own[f"{block}:logits"].copy_(torch.from_numpy(logits[k, i]))
                own[f"{block}:temperature"].fill_(tau[i])
    return logits.astype(np.float64)


@pytest.mark.parametrize("tau", [[1.0] * 4, [0.0, 0.0, 2.0, 2.0], [0.0] * 4])
def test_charges_are_the_formulas(tau: list[float]) -> None:
    base = net()
    tasks = ("a", "b", "c")
    model = model_of(base, plan_of(base), *tasks)
    a = numbers(model, tau)
    p = np.exp(a[..., 0]) / np.exp(a).sum(2)
    on = np.array([t > 0 for t in tau])
    pairs = [(i, j) for i in range(3) for j in range(i + 1, 3)]
    early, late = np.array([4, 3, 2, 1]) / 4, np.array([1, 2, 3, 4]) / 4
    expected = {
        ("sparsity", "paper"): np.log(p)[:, on].sum(),
        ("sparsity", "code"): sum(-np.log(1 - p[k, on]).mean() for k in range(3) if on.any()),
        ("sharing", "paper"): sum((early * abs(p[i] - p[j]))[on].sum() for i, j in pairs),
        ("sharing", "code"): sum((late * abs(a[i, :, 0] - a[j, :, 0]))[on].sum() for i, j in pairs),
    }
    own = {t: model.tasks[t].own for t in tasks}
    for (what, form), value in expected.items():
        make = PolicySparsity if what == "sparsity" else PolicySharing
        found = make(0.3, BLOCKS, form)({}, own, {})
        assert found.item() == pytest.approx(0.3 * value, abs=1e-5), (what, form)
    step = model_of(base, plan_of(base, losses="code"), *tasks).penalty("a")
    assert step.item() == 0.0  # nothing is learned yet
    mean = PolicySparsity(0.3, BLOCKS).figures(own["a"])
    assert mean == ({"executed": pytest.approx(p[0, on].mean())} if on.any() else {})


def test_charges_are_of_all_tasks_of_a_step_together() -> None:
    base = net()
    model = model_of(base, plan_of(base, sparsity=0.2, sharing=0.7))
    a = numbers(model, [1.0] * 4)
    p = np.exp(a[..., 0]) / np.exp(a).sum(2)
    expected = 0.2 * np.log(p).sum() + 0.7 * (np.array([4, 3, 2, 1]) / 4 * abs(p[0] - p[1])).sum()
    step = model.step({"a": images(2), "b": images(2)})
    assert step.penalty.item() == pytest.approx(expected, rel=1e-5)
    assert model.penalty("a").item() == pytest.approx(0.2 * np.log(p[0]).sum(), rel=1e-5)


# ---------------------------------------------------------------------------- the course


def test_the_curriculum_is_the_authors_where_speeds_agree() -> None:
    for speed, blocks, cycles in ((3, 8, 48), (1, 16, 40), (3, 4, 12)):
        course = LearnPolicies(("b",) * blocks, speed * blocks / cycles, 5.0, 0.2)
        counts = [course.count(c, cycles) for c in range(cycles)]
        assert counts == [min(blocks, c // speed + 1) for c in range(cycles)]
    assert [LearnPolicies(BLOCKS, 0.0, 5.0, 0.2).count(c, 3) for c in range(3)] == [4, 4, 4]
    assert LearnPolicies(BLOCKS, 1.0, 5.0, 0.2).count(3, 4) == 4


def test_the_temperature_is_the_authors_where_the_ends_agree() -> None:
    course = LearnPolicies(BLOCKS, 0.5, 5.0, 5.0 * 0.965**85)
    found = [course.temperature(c, 86) for c in range(86)]
    assert found == pytest.approx([5.0 * 0.965**c for c in range(86)])
    assert LearnPolicies(BLOCKS, 0.5, 5.0, 0.2).temperature(0, 1) == 5.0


def test_the_course_writes_what_adapters_read() -> None:
    base = net()
    model = model_of(base, plan_of(base))
    choose(model, "a", "0000")
    own = model.tasks["a"].own
    course = LearnPolicies(BLOCKS, 1.0, 4.0, 1.0)
    for epoch, learned in enumerate((1, 2, 3, 4)):
        course(model, ("a", "b"), epoch, 4)
        heat = 4.0 * 0.25 ** (epoch / 3)
        expected = [0.0] * (4 - learned) + [heat] * learned
        assert [float(own[f"{b}:temperature"]) for b in BLOCKS] == pytest.approx(expected)
        assert all(bool(own[f"{b}:execute"]) for b in BLOCKS)  # the others wait and execute


def test_the_final_policy_is_drawn_by_seed_and_task() -> None:
    base = net()
    tasks = tuple(f"t{i}" for i in range(100))
    model = model_of(base, plan_of(base), *tasks)

    def drawn(final: Any, seed: int, names: tuple[str, ...] = tasks) -> list[list[bool]]:
        for task in names:
            for block, logit in zip(BLOCKS, (2.0, 0.0, -1.0, 0.0), strict=True):
                own = model.tasks[task].own
                with torch.no_grad():
                    own[f"{block}:logits"].copy_(torch.tensor([logit, 0.0]))
                own[f"{block}:temperature"].fill_(float(block != "blocks.3"))
                own[f"{block}:execute"].fill_(True)
        FixPolicies(BLOCKS, final, seed)(model, {t: model.tasks[t].own for t in names}, {})
        assert all(
            float(model.tasks[t].own[f"{b}:temperature"]) == 0.0 for t in names for b in BLOCKS
        )
        return [[bool(model.tasks[t].own[f"{b}:execute"]) for b in BLOCKS] for t in names]

    first = drawn("sample", 0)
    assert first == drawn("sample", 0)
    assert first != drawn("sample", 1)
    assert first[7:9] == drawn("sample", 0, ("t7", "t8"))  # whatever other tasks there are
    means = np.mean(first, 0)
    expected = [1 / (1 + np.exp(-2.0)), 0.5, 1 / (1 + np.exp(1.0))]
    assert means[:3] == pytest.approx(expected, abs=0.15)
    assert means[3] == 1.0  # was never learned
    assert drawn("likely", 0)[0] == [True, True, False, True]


def loaders(rows: int = 40) -> dict[str, tuple[Any, Any]]:
    found = {}
    for i, task in enumerate("ab"):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(rows, 3, 8, 8, generator=generator)
        data = TensorDataset(x, torch.randint(0, 3, (rows,), generator=generator))
        found[task] = (DataLoader(data, 4, shuffle=True), DataLoader(data, 20))
    return found


def classifiers(base: nn.Module, plan: Sharing) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, plan, example=images(2))
    for task in "ab":
        model.add_task(task, weft.Classification(3))
    return model


@pytest.mark.parametrize("retrain_from", ["start", "policy"])
def test_training_runs_its_course(retrain_from: Any) -> None:
    base = net()
    plan = plan_of(base, warmup=0.2, retrain=0.3, retrain_from=retrain_from, seed=3)
    model = classifiers(base, plan)
    states = [snapshot(model)]
    optimised: list[str] = []

    def note(epoch: Epoch) -> None:
        states.append(snapshot(epoch.model))
        optimised.append(epoch.rows["a"]["phase"])

    history = weft.fit(
        model, loaders(), epochs=10, lr=0.05, callbacks=[note], progress=False, keep="last"
    )
    assert optimised == ["warm-up"] * 2 + ["policy"] * 5 + ["retrain"] * 3
    assert [row["penalty"] == 0.0 for row in history["a"]] == [True] * 2 + [False] * 5 + [True] * 3
    logits = [{k: v for k, v in s.items() if "logits" in k} for s in states]
    assert same(logits[0], logits[2])
    moved = [
        {k.split("/")[1][0] for k in logits[0] if not torch.equal(one[k], other[k])}
        for one, other in pairwise(logits[2:8])
    ]
    # Half of the phase for four blocks: one more every 0.625 epochs.
    assert moved == [{"3"}, {"2", "3"}, {"0", "1", "2", "3"}, *[{"0", "1", "2", "3"}] * 2]
    policy = [{k: v for k, v in s.items() if "execute" in k or "temper" in k} for s in states]
    assert all(same(policy[7], after) for after in (policy[7], *policy[8:]))  # fixed
    assert same(logits[7], logits[10])
    assert all(bool(v) for k, v in policy[6].items() if "execute" in k)
    assert all(float(v) == 0.0 for k, v in policy[7].items() if "temper" in k)


def test_retraining_starts_from_the_start_or_from_policy_learning() -> None:
    base = net()
    expected = {}
    for retrain_from in ("start", "policy"):
        model = classifiers(base, plan_of(base, retrain_from=retrain_from))
        states = [snapshot(model)]
        weft.fit(
            model,
            loaders(),
            epochs=5,
            lr=0.05,
            callbacks=[lambda epoch, states=states: states.append(snapshot(epoch.model))],
            # so slow that retraining leaves the weights where it found them
            optimizer=lambda groups: Slow(groups, after=3 * 10),
            progress=False,
            keep="last",
        )
        weights = {k for k in states[0] if k.endswith("conv.weight")}
        expected[retrain_from] = [
            all(torch.equal(states[i][k], states[-1][k]) for k in weights) for i in (0, -3)
        ]
    assert expected == {"start": [True, False], "policy": [False, True]}


class Slow(torch.optim.SGD):
    """Does nothing any more after some steps."""

    def __init__(self, groups: Any, after: int) -> None:
        super().__init__(groups)
        self.left = after

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left >= 0:
            super().step(closure)


def test_weights_and_policies_learn_in_turn_on_disjoint_data() -> None:
    plan = plan_of(net(), policy_data=0.25)
    weights, policy = plan.phases[1].turns
    assert (weights.data, policy.data) == ((0.0, 0.75), (0.75, 1.0))
    assert (weights.penalty, policy.penalty) == (0.0, 1.0)
    assert not policy.heads
    for key in ("blocks.0.conv.weight", "stem.0.bias"):
        assert weights.trains(key)
        assert not policy.trains(key)
    assert policy.trains("blocks.0:logits")
    assert not weights.trains("blocks.0:logits")
    (group,) = plan.groups
    assert group.takes("blocks.0:logits")
    assert not group.decay


def test_fitting_some_of_the_tasks_is_refused_unless_told() -> None:
    base = net()
    model = classifiers(base, plan_of(base))
    some = {"a": loaders()["a"]}
    with pytest.raises(PlanError, match=r"would change b\. .*subset=True"):
        weft.fit(model, some, epochs=3, progress=False)
    weft.fit(model, some, epochs=3, subset=True, progress=False)


def test_a_second_fit_begins_with_all_blocks_executed() -> None:
    base = net()
    model = classifiers(base, plan_of(base))
    choose(model, "a", "0000")
    seen: list[bool] = []

    def note(epoch: Epoch) -> None:
        own = epoch.model.tasks["a"].own
        seen.append(all(bool(own[f"{b}:execute"]) for b in BLOCKS))

    weft.fit(model, loaders(8), epochs=4, callbacks=[note], progress=False)
    assert seen[0]


# --------------------------------------------------------------------------- the options


def test_blocks_are_found_named_or_stated() -> None:
    base, x = net(), images(2)
    found = weft.adashare(base, example=x)
    assert found.options["blocks"] == SHORTCUTS
    assert {k: v for k, v in found.adapters.items() if k in BLOCKS} == {
        block: BlockPolicy(shortcut) for block, shortcut in SHORTCUTS.items()
    }
    assert set(found.adapters) == {*BLOCKS, "blocks.1.down"}
    some = weft.adashare(base, example=x, blocks=["blocks.2", "blocks.1"])
    assert some.options["blocks"] == {"blocks.1": "down", "blocks.2": ""}
    for options in ({}, {"blocks": ["blocks.1"]}):
        with pytest.raises(PlanError, match=r"give it example=x.*or say which.*blocks=\{block"):
            weft.adashare(base, **options)
    with pytest.raises(PlanError, match=r"^adashare skips residual blocks.*post-norm"):
        weft.adashare(nn.Sequential(nn.Conv2d(3, 4, 3)), example=x)
    with pytest.raises(PlanError, match=r"One is a list, too: blocks=\['blocks.0'\]"):
        weft.adashare(base, blocks="blocks.0", example=x)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"inserts at 'blocks.9'"):
        weft.MultiTaskModel(base, weft.adashare(base, blocks={"blocks.9": ""}))
    remade = weft.adashare(base, **found.options)
    assert dict(remade.adapters) == dict(found.adapters)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sparsity": -1.0}, r"sparsity=\.\.\.\) is a number >= 0, found -1.0"),
        ({"sharing": float("nan")}, "sharing"),
        ({"policy_lr": -2.0}, "policy_lr"),
        ({"warmup": 0.6}, "leave some for policies; found 0.6 and 0.5"),
        ({"retrain": 0.0}, "retrain"),
        ({"curriculum": 1.5}, r"curriculum=\.\.\.\) is a number in \[0, 1\], found 1.5"),
        ({"policy_data": 0.0}, "policy_data"),
        ({"temperature": (5.0, 0.0)}, "two numbers > 0"),
        ({"temperature": (5.0,)}, "two numbers > 0"),
        ({"temperature": 1.0}, "two numbers > 0"),
        ({"losses": "mine"}, "losses=...\\) is 'paper' or 'code', found 'mine'"),
        ({"final": "best"}, "final"),
        ({"evaluation": "best"}, "evaluation"),
        ({"retrain_from": "zero"}, "retrain_from"),
        ({"batchnorm": "none"}, "batchnorm"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=f"adashare.*{complaint}"):
        plan_of(net(), **options)


def test_tasks_join_a_model_as_the_plain_network() -> None:
    base = net().eval()
    model = model_of(base, plan_of(base)).eval()
    choose(model, "a", "0101")
    model.add_task("new", NO_HEAD)
    x = images()
    assert torch.equal(model(x, task="new"), base(x))
