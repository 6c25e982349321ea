"""DynaShare: gates by input on top of a policy, what they are charged, and rows left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import weft
from methods.residual_nets import (
    BLOCKS,
    SHORTCUTS,
    Block,
    choose,
    images,
    learn,
    model_of,
    net,
    snapshot,
)
from methods.test_adashare import by_hand, classifiers, loaders
from weft.adapters import BlockPolicy, InstanceGate
from weft.core.sharing import Sharing
from weft.errors import DataError, PlanError
from weft.penalties import GateRate

ALL = (0.5,) * 4


def plan_of(base: nn.Module, **options: Any) -> Sharing:
    return weft.dynashare(base, **{"example": images(2), "target": ALL, **options})


def gated_model(base: nn.Module, execute: str = "1111", **options: Any) -> weft.MultiTaskModel:
    """A model whose tasks have fixed policies, refined by gates that differ between inputs."""
    model = model_of(base, plan_of(base, **options))
    for task in model.task_names:
        choose(model, task, execute, gated=True)
    for key, tensor in model.shared.items():
        if key.endswith(("squeeze.weight", "choose.weight")):
            with torch.no_grad():
                tensor.copy_(torch.randn_like(tensor))
    return model


def always(model: weft.MultiTaskModel, opened: bool) -> None:
    """Let every gate decide the same way for all inputs."""
    for block in BLOCKS:
        with torch.no_grad():
            bias = model.shared[f"{block}:gate.choose.bias"]
            bias.copy_(torch.tensor([0.0, 1e4] if opened else [1e4, 0.0]))


def scores(model: weft.MultiTaskModel, block: str, x: Tensor) -> Tensor:
    """A gate written out, in eval mode."""
    t = {k.partition(":gate.")[2]: v for k, v in model.shared.items() if k.startswith(f"{block}:")}
    hidden = x.mean((2, 3)) @ t["squeeze.weight"].T + t["squeeze.bias"]
    hidden = (hidden - t["norm.running_mean"]) / (t["norm.running_var"] + 1e-5).sqrt()
    hidden = (hidden * t["norm.weight"] + t["norm.bias"]).relu()
    return hidden @ t["choose.weight"].T + t["choose.bias"]


def refined(model: weft.MultiTaskModel, x: Tensor, policy: str) -> tuple[Tensor, list[Tensor]]:
    """The output in eval mode and the gates of all blocks, written out."""
    x, gates = model.base.stem(x), []
    for name, block, u in zip(BLOCKS, model.base.blocks, policy, strict=True):
        gates.append(scores(model, name, x).argmax(1))
        around = x if block.down is None else block.down(x)
        executed = (around + block.norm(block.conv(x))).relu()
        share = (int(u) * gates[-1]).reshape(-1, 1, 1, 1)
        x = share * executed + (1 - share) * around
    return x.mean((2, 3)), gates


# ------------------------------------------------------------------------------- running


@pytest.mark.parametrize("training", [True, False])
def test_gates_that_are_open_give_adashare(training: bool) -> None:
    base = net()
    for policy in ("1111", "0101"):
        model = gated_model(base, policy).train(training)
        always(model, True)
        other = model_of(base, weft.adashare(base, blocks=SHORTCUTS)).train(training)
        choose(other, "a", policy)
        x = images()
        found, expected = model(x, task="a"), other(x, task="a")
        assert torch.allclose(found, expected, atol=1e-6)
        for one, two in zip(model.base.buffers(), other.base.buffers(), strict=True):
            assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_gates_that_are_closed_skip_everything(training: bool) -> None:
    base = net()
    model = gated_model(base).train(training)
    always(model, False)
    x = images()
    expected = by_hand(copy.deepcopy(model.base).train(training), x, [0, 0, 0, 0])
    assert torch.allclose(model(x, task="a"), expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_policy_that_skips_ignores_the_gate(training: bool) -> None:
    base = net()
    model = gated_model(base, "0000").train(training)
    x = images()
    outputs = []
    for opened in (True, False):
        always(model, opened)
        step = model.step({"a": x})
        assert not any("gate" in what for what in step.records["a"].values())
        assert step.penalty.item() == 0.0
        outputs.append(step.outputs["a"])
    if not training:
        assert torch.equal(*outputs)
    assert torch.allclose(
        outputs[0], by_hand(copy.deepcopy(base).train(training), x, [0] * 4), atol=1e-6
    )


@pytest.mark.parametrize("policy", ["1111", "1011"])
def test_gates_refine_the_policy_for_each_input(policy: str) -> None:
    base = net()
    model = gated_model(base, policy).eval()
    x = images(12)
    with torch.no_grad():
        expected, gates = refined(model, x, policy)
        view = model.view("a")
        assert torch.allclose(view(x), expected, atol=1e-5)
    assert any(0 < g.float().mean() < 1 for g in gates)
    assert set(view.records) == {b for b, u in zip(BLOCKS, policy, strict=True) if u == "1"}
    for block, gate in zip(BLOCKS, gates, strict=True):
        if block in view.records:
            assert torch.equal(view.records[block]["gate"].long(), gate)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_of_a_batch_are_what_they_are_alone(layout: torch.memory_format) -> None:
    base = net().double()
    model = gated_model(base).eval()
    x = images(9).double().contiguous(memory_format=layout)
    with torch.no_grad():
        alone = torch.cat([model(row, task="a") for row in x.split(1)])
        assert torch.allclose(model(x, task="a"), alone, atol=1e-12)
        mixed = model(x, task=list("abaababba"))
        assert torch.allclose(mixed, alone, atol=1e-12)
        assert torch.allclose(model.predict_all(x)["b"], alone, atol=1e-12)


def test_only_rows_that_execute_a_block_are_computed_by_it() -> None:
    base = net()
    model = gated_model(base).eval()
    view = model.view("a")
    blocks: list[Block] = [view.structure.get_submodule(b).inner for b in BLOCKS]

    def computed(x: Tensor) -> list[int]:
        for block in blocks:
            block.rows.clear()
        with torch.no_grad():
            view(x)
        return [sum(block.rows) for block in blocks]

    for rows in (1, 2, 12):
        x = images(rows)
        _, gates = refined(model, x, "1111")
        assert computed(x) == [int(g.sum()) for g in gates]
        assert all(len(block.rows) <= 1 for block in blocks)
    for opened, count in ((True, 5), (False, 0)):
        always(model, opened)
        view.bind(model.tensors("a"))
        assert computed(images(5)) == [count] * 4


def test_inputs_of_any_order_of_channels_are_averaged_over_places() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    base = nn.Sequential(Adds(), Adds())
    for shape in ((6, 4), (6, 5, 4), (6, 5, 3, 4)):
        x = torch.randn(shape)
        plan = weft.dynashare(base, example=x, target=(0.5, 0.5))
        model = model_of(base, plan)
        choose(model, "a", "11", gated=True)
        assert model.train()(x, task="a").shape == shape
        with torch.no_grad():
            alone = torch.cat([model.eval()(row, task="a") for row in x.split(1)])
            assert torch.allclose(model(x, task="a"), alone, atol=1e-6)


def test_training_mixes_by_hard_samples_with_gradients_for_gates_and_both_ways() -> None:
    base = net()
    model = model_of(base, plan_of(base)).train()
    choose(model, "a", "1111", gated=True)  # fresh gates are undecided
    step = model.step({"a": images(12)})
    gates = {b: step.records["a"][b]["gate"] for b in BLOCKS}
    for gate in gates.values():
        assert gate.shape == (12,)
        assert set(gate.detach().tolist()) <= {0.0, 1.0}
        assert gate.requires_grad
    step.outputs["a"].square().sum().backward()
    for key, parameter in model.shared_trainable().items():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    counts = {k: int(v) for k, v in model.shared.items() if "num_batches" in k}
    assert set(counts.values()) == {1}


def test_drawn_decisions_differ_between_forwards_and_argmax_does_not() -> None:
    base = net()
    x = images(12)
    for decision, distinct in (("argmax", 1), ("sample", 10)):
        model = model_of(base, plan_of(base, decision=decision), "a").eval()
        choose(model, "a", "1111", gated=True)  # fresh gates are undecided
        with torch.no_grad():
            seen = {tuple(model(x, task="a").flatten().tolist()) for _ in range(10)}
        assert len(seen) == distinct


def test_fresh_tasks_are_the_base_and_gates_are_shared() -> None:
    base = net().eval()
    model = model_of(base, plan_of(base)).eval()
    x = images()
    assert torch.equal(model(x, task="a"), base(x))
    assert {k.partition(":")[2].split(".")[0] for k in model.shared} == {"gate"}
    assert all("gate." not in k for k in model.tasks["a"].own)
    gates = sum(p.numel() for p in model.shared.parameters())
    sizes = [4, 4, 6, 6]
    assert gates == sum(c * 16 + 16 + 32 + 16 * 2 + 2 for c in sizes)


def test_gates_of_resnets_are_as_large_as_the_authors() -> None:
    torchvision = pytest.importorskip("torchvision")
    for name, millions in (("resnet18", 0.024), ("resnet34", 0.055)):
        base = torchvision.models.get_model(name, weights=None)
        count = 8 if name == "resnet18" else 16
        plan = weft.dynashare(base, example=torch.randn(1, 3, 32, 32), target=(0.5,) * count)
        model = weft.MultiTaskModel(base, plan)
        gates = sum(p.numel() for p in model.shared.parameters())
        assert gates / 1e6 == pytest.approx(millions, abs=0.006)


def test_a_group_of_one_row_is_refused_in_training_before_anything_changes() -> None:
    base = net()
    model = gated_model(base).train()
    before = snapshot(model)
    with pytest.raises(DataError, match="group of one row"):
        model.step({"a": images(1)})
    after = snapshot(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_folding_is_refused_where_a_gate_decides() -> None:
    base = net()
    model = gated_model(base, "0010").eval()
    with pytest.raises(PlanError, match="decides for each input has no plain form"):
        model.fold("a")
    choose(model, "a", "0000")
    x = images()
    with torch.no_grad():
        assert torch.allclose(model.fold("a")(x), model(x, task="a"), atol=1e-6)


def test_a_compiled_view_is_one_graph_for_all_policies() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    base = net()
    model = gated_model(base).eval()
    choose(model, "b", "0110", gated=True)
    counter = CompileCounterWithBackend("eager")
    view = model.view("a")
    compiled = torch.compile(view, backend=counter, fullgraph=True)
    x = images(8)
    with torch.no_grad():
        for task in "ab":
            view.bind(dict(model.tensors(task)))
            assert torch.allclose(compiled(x), model(x, task=task), atol=1e-5)
        program = torch.export.export(model.view("b"), (x,))
        assert torch.allclose(program.module()(x), model(x, task="b"), atol=1e-5)
    assert counter.frame_count <= 2


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    base = net()
    model = gated_model(base, "1101").eval()
    weft.Bank(tmp_path).save(model)
    loaded = weft.Bank(tmp_path).load(base).eval()
    x = images(8)
    with torch.no_grad():
        for task in "ab":
            assert torch.equal(loaded(x, task=task), model(x, task=task))
    assert dict(loaded.sharing.adapters) == dict(model.sharing.adapters)


# ------------------------------------------------------------------------------- charges


def test_the_rate_is_the_formula() -> None:
    base = net()
    target = (0.25, 1.0, 0.75, 0.5)
    model = model_of(base, plan_of(base, target=target, rate=7.0)).train()
    for task, policy in (("a", "1111"), ("b", "1101")):
        choose(model, task, policy, gated=True)
    step = model.step({"a": images(8), "b": images(8)})
    expected = 0.0
    for task, policy in (("a", "1111"), ("b", "1101")):
        for block, t, u in zip(BLOCKS, target, policy, strict=True):
            if t < 1.0 and u == "1":
                gate = step.records[task][block]["gate"].detach().numpy()
                expected += 7.0 / 4 * (t - gate.mean()) ** 2
    assert step.penalty.item() == pytest.approx(expected, rel=1e-5)
    step.penalty.backward()
    charged = [f"{b}:gate.choose.bias" for b in BLOCKS if b != "blocks.1"]
    assert all(model.shared[key].grad.any() for key in charged)
    with pytest.raises(PlanError, match="charges for what a forward records"):
        model.penalty("a")


def test_the_rate_in_numpy() -> None:
    gates = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    records = {"a": {"x": {"gate": torch.tensor(gates)}}, "b": {"y": {"gate": torch.ones(3)}}}
    charge = GateRate(2.0, (("x", 0.5), ("y", 0.25)), 10)(records, {}, {})
    expected = 2.0 * ((0.5 - gates.mean()) ** 2 + (0.25 - 1.0) ** 2) / 10
    assert charge.item() == pytest.approx(expected)
    assert GateRate(2.0, (("x", 0.5),), 10)({"a": {}}, {}, {}).item() == 0.0


def test_gates_are_trained_towards_their_targets() -> None:
    base = net()
    model = model_of(base, plan_of(base, target=(0.2, 0.8, 0.2, 0.8)), "a").train()
    choose(model, "a", "1111", gated=True)
    optimizer = torch.optim.Adam(model.shared.parameters(), lr=0.05)
    x = images(64)
    for _ in range(60):
        optimizer.zero_grad()
        model.step({"a": x}).penalty.backward()
        optimizer.step()
    rates: dict[str, list[float]] = {b: [] for b in BLOCKS}
    with torch.no_grad():
        for _ in range(10):
            for block, records in model.step({"a": x}).records["a"].items():
                rates[block].append(float(records["gate"].mean()))
    means = [float(np.mean(r)) for r in rates.values()]
    assert means == pytest.approx([0.2, 0.8, 0.2, 0.8], abs=0.12)


class Checkpointed(nn.Module):
    """A network whose blocks are run again during the backward."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = base.stem, base.blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x.mean((2, 3))


@pytest.mark.parametrize("learned", [True, False])
def test_activation_checkpointing_changes_nothing(learned: bool) -> None:
    gradients, statistics = [], []
    for wrap in (lambda base: base, Checkpointed):
        model = model_of(wrap(net()), plan_of(wrap(net()))).train()
        for task in "ab":
            choose(model, task, "1111", gated=True)
        if learned:
            learn(model)
        torch.manual_seed(5)
        step = model.step({t: images(8) for t in "ab"})
        (sum(o.square().sum() for o in step.outputs.values()) + step.penalty).backward()
        found = {k: p.grad for k, p in model.named_parameters()}
        gradients.append(dict(sorted(found.items())))
        statistics.append(dict(sorted(snapshot(model).items())))
    for (key, one), (other_key, other) in zip(*(g.items() for g in gradients), strict=True):
        assert key == other_key
        assert (one is None) == (other is None), key
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6), key
    assert statistics[0].keys() == statistics[1].keys()
    for key, value in statistics[0].items():
        assert torch.allclose(value, statistics[1][key]), key


# ---------------------------------------------------------------------------- the course


def test_training_runs_its_course() -> None:
    base = net()
    plan = plan_of(base, warmup=0.2, retrain=0.4, seed=1)
    model = classifiers(base, plan)
    assert [p.name for p in plan.phases] == ["warm-up", "policy", "retrain"]
    assert not plan.phases[2].restart
    assert plan.phases[2].penalty == 1.0
    gates, gated = [], []

    def note(epoch: Any) -> None:
        gates.append({k: v.detach().clone() for k, v in epoch.model.shared.items()})
        own = epoch.model.tasks["a"].own
        gated.append({bool(own[f"{b}:gated"]) for b in BLOCKS})

    history = weft.fit(model, loaders(), epochs=10, lr=0.05, callbacks=[note], progress=False)
    assert gated == [{False}] * 5 + [{True}] * 5
    assert all(torch.equal(gates[0][k], gates[4][k]) for k in gates[0])
    assert any(bool(model.tasks[t].own[f"{b}:execute"]) for t in "ab" for b in BLOCKS)
    assert any(not torch.equal(gates[4][k], gates[9][k]) for k in gates[4])
    assert all(row["penalty"] > 0.0 for row in history["a"][6:])


def test_learning_policies_leaves_gates_out() -> None:
    base = net()
    model = gated_model(base).train()
    learn(model)
    step = model.step({"a": images()})
    assert not any("gate" in what for what in step.records["a"].values())
    step.outputs["a"].square().sum().backward()
    assert all(p.grad is None for p in model.shared.parameters())


# --------------------------------------------------------------------------- the options


def test_targets_choose_what_has_a_gate() -> None:
    base = net()
    plan = plan_of(base, target=0.55)
    kinds = [type(plan.adapters[b]) for b in BLOCKS]
    assert kinds == [BlockPolicy, BlockPolicy, InstanceGate, InstanceGate]
    assert plan.adapters["blocks.2"] == InstanceGate(6, 1)
    assert [plan.adapters[b].trains_shared for b in BLOCKS] == [False, False, True, True]
    assert plan.options["target"] == (1.0, 1.0, 0.55, 0.55)
    rate = plan.penalties[2]
    assert rate == GateRate(25.0, (("blocks.2", 0.55), ("blocks.3", 0.55)), 4)
    assert plan_of(base, target=(0.5, 1, 1, 1)).adapters["blocks.1"] == BlockPolicy("down")
    remade = weft.dynashare(base, example=images(2), **plan.options)
    assert dict(remade.adapters) == dict(plan.adapters)


def test_blocks_that_cannot_be_divided_by_rows_have_a_policy_only() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + self.linear(x) * mask

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Masked(), Masked()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x, x.sign()), x.sign())

    plan = weft.dynashare(Masking(), example=torch.randn(2, 4))
    assert {type(i) for i in plan.adapters.values()} == {BlockPolicy}
    assert set(plan.refused) == {"two"}
    assert "called with other tensors" in plan.refused["two"]


def test_targets_may_be_of_numpy() -> None:
    same = plan_of(net(), target=0.5).options["target"]
    assert plan_of(net(), target=np.float32(0.5)).options["target"] == same
    assert plan_of(net(), target=np.array(same)).options["target"] == same


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target": (0.5, 0.5)}, "one per block: found 2 for 4 blocks, blocks.0"),
        ({"target": 0.0}, r"target=\.\.\.\) is a number in \(0, 1\] or one for each block"),
        ({"target": (0.5, 0.5, 0.5, 1.5)}, r"is a number in \(0, 1\]"),
        ({"rate": -1.0}, r"rate=\.\.\.\) is a number >= 0"),
        ({"decision": "likely"}, "decision=...\\) is 'argmax' or 'sample'"),
        ({"losses": "none"}, "losses"),
        ({"example": None}, "sizes its gates by running the base once"),
        ({"example": None, "blocks": SHORTCUTS}, "give it example=x"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=f"^dynashare.*{complaint}"):
        plan_of(net(), **options)
