"""PaCo: mixtures, limits that are known, new tasks by a few numbers, and tasks that diverge."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from laws.variants import ISOLATED, LAWS, OF_PATCHES, Variant, name_of, variants
from weft.core.sharing import Taken
from weft.errors import DataWarning, PlanError, TrainingError
from weft.methods.paco import COEFFICIENTS, ResetCoefficients
from weft.patches import Mixture
from weft.patches.mixture import bases_key


def net(seed: int = 0) -> nn.Sequential:
    """Linear layers with a layer normalisation between."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())


def normed(seed: int = 0) -> nn.Sequential:
    """A convolution with batch normalisation."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def data(tasks: str = "ab", batches: int = 3) -> dict[str, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    return {
        task: [
            (
                torch.randn(8, 5, generator=generator),
                torch.randint(3, (8,), generator=generator),
            )
            for _ in range(batches)
        ]
        for task in tasks
    }


def model_of(tasks: str = "ab", base: nn.Module | None = None, **options: Any) -> Any:
    base = net() if base is None else base
    model = weft.MultiTaskModel(base, weft.paco(base, **options), example=torch.zeros(2, 5))
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        model.add_task(task, weft.Classification(3))
    return model


def numbers(model: Any, task: str) -> Tensor:
    return model.tasks[task].own[COEFFICIENTS]


# --------------------------------------------------------------------------------- the mixture


def test_every_tensor_is_the_sum_of_weighted_bases() -> None:
    model = model_of(k=3, noise=1.0)
    w = numbers(model, "a").detach()
    tensors = model.tensors("a")
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        bases = model.shared[bases_key(name)].detach()
        assert bases.shape == (3, *tensors[name].shape)
        expected = sum(float(w[k]) * bases[k].double() for k in range(3))
        assert torch.allclose(tensors[name].detach().double(), expected, atol=1e-6)
    soft = model_of(k=3, noise=1.0, softmax=True)
    w = numbers(soft, "a").detach().double()
    expected = (w.exp() / w.exp().sum()) @ soft.shared["0.bias:bases"].detach().double()
    assert torch.allclose(soft.tensors("a")["0.bias"].detach().double(), expected, atol=1e-6)


def test_gradients_are_those_of_the_sum() -> None:
    model = model_of(k=3, noise=1.0).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    w = numbers(model, "a").detach().clone().requires_grad_()
    phis = {n: model.shared[bases_key(n)].detach().clone().requires_grad_()
            for n in ("0.weight", "0.bias", "3.weight", "3.bias")}  # fmt: skip
    mixed = {n: torch.einsum("k,k...->...", w, phi) for n, phi in phis.items()}
    hidden = nn.functional.linear(x, mixed["0.weight"], mixed["0.bias"])
    hidden = torch.tanh(nn.functional.layer_norm(hidden, (12,)))
    output = torch.tanh(nn.functional.linear(hidden, mixed["3.weight"], mixed["3.bias"]))
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (model.view("a")(x) * direction).sum().backward()
    assert torch.allclose(numbers(model, "a").grad, w.grad)
    for name, phi in phis.items():
        assert torch.allclose(model.shared[bases_key(name)].grad, phi.grad), name


@pytest.mark.parametrize("softmax", [False, True])
def test_a_fresh_task_is_the_base_up_to_rounding(softmax: bool) -> None:
    base = net()
    model = model_of(base=base, k=7, softmax=softmax)
    x = torch.randn(6, 5)
    for task in "ab":
        w = numbers(model, task).detach().double()
        w = w.softmax(0) if softmax else w
        assert float(w.sum()) == pytest.approx(1.0, abs=1e-6)
        assert bool((w > 0).all())
        assert torch.allclose(model.view(task)(x), base(x), atol=1e-6)
    assert not torch.allclose(numbers(model, "a"), numbers(model, "b"))


def test_bases_start_alike_or_apart_by_noise() -> None:
    alike = weft.paco(net(), k=3).created["0.weight:bases"].value
    assert torch.equal(alike, net()[0].weight.detach().expand(3, 12, 5))
    apart = weft.paco(net(), k=400, noise=0.5, seed=1).created["0.weight:bases"].value
    difference = apart - net()[0].weight.detach()
    assert float(difference.std()) == pytest.approx(
        0.5 * float(net()[0].weight.detach().std()), rel=0.05
    )
    again = weft.paco(net(), k=400, noise=0.5, seed=1).created["0.weight:bases"].value
    assert torch.equal(apart, again)


def test_normalisation_is_private_or_shared_and_never_mixed() -> None:
    plan = weft.paco(normed())
    assert {n for n, p in plan.patches.items() if isinstance(p, Mixture)} == {"0.weight", "0.bias"}
    assert {n for n in plan.patches if n.startswith("1.")} == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }  # fmt: skip
    assert not plan.train_shared
    shared = weft.paco(normed(), norms="shared")
    assert set(shared.patches) == {"0.weight", "0.bias"}
    assert {n.split(".")[0] for n in shared.train_shared} == {"1"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"k": 0}, "k=...\\) is a whole number of at least 1, found 0"),
        ({"bases": "frozen"}, "'trained' or 'given', found 'frozen'"),
        ({"norms": "mixed"}, "'private' or 'shared', found 'mixed'"),
        ({"reset": "zero"}, "'interpolate' or 'copy', found 'zero'"),
        ({"noise": -1.0}, "noise"),
        ({"limit": 0.0}, "limit"),
        ({"limit": 1.0, "fixed_coefficients": True}, "Give one of the two"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        weft.paco(net(), **options)
    with pytest.raises(PlanError, match="paco mixes parameters, and this base has none but"):
        weft.paco(nn.LayerNorm(3))


# --------------------------------------------------------------------------------- known limits


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_basis_for_each_task_is_full_fine_tuning(optimizer: Any) -> None:
    """The trajectories agree at every epoch: one-hot numbers, which stay."""
    model = model_of("abc", k=3, fixed_coefficients=True).double()
    base = net().double()
    full = weft.MultiTaskModel(
        base, weft.full_finetune(base), example=torch.zeros(2, 5, dtype=torch.float64)
    )
    for place, task in enumerate("abc"):
        torch.manual_seed(place)
        full.add_task(task, weft.Classification(3))
        full.tasks[task].head.load_state_dict(model.tasks[task].head.state_dict())
        with torch.no_grad():
            numbers(model, task).copy_(torch.eye(3)[place])
    batches = {t: [(x.double(), y) for x, y in of] for t, of in data("abc").items()}
    states: dict[bool, list[dict[str, Tensor]]] = {True: [], False: []}

    def note(kept: list[dict[str, Tensor]]) -> Any:
        def callback(epoch: Any) -> None:
            found = {t: epoch.model.tensors(t) for t in "abc"}
            kept.append(
                {f"{t}.{n}": v.detach().clone() for t in "abc" for n, v in found[t].items()}
            )

        return callback

    for one, which in ((model, True), (full, False)):
        weft.fit(
            one, batches, epochs=3, lr=0.05 if optimizer == "sgd" else 0.003, optimizer=optimizer,
            weight_decay=0.01, progress=False, callbacks=[note(states[which])],
        )  # fmt: skip
    for mixed, owned in zip(*states.values(), strict=True):
        assert mixed.keys() == owned.keys()
        for name in mixed:
            assert torch.equal(mixed[name], owned[name]), name
    for place, task in enumerate("abc"):
        assert torch.equal(numbers(model, task), torch.eye(3, dtype=torch.float64)[place])


def test_one_basis_is_hard_sharing_up_to_a_factor_of_the_task() -> None:
    model = model_of(k=1)
    assert numbers(model, "a").tolist() == [1.0]
    with torch.no_grad():
        numbers(model, "b").fill_(2.0)
    one, two = model.tensors("a"), model.tensors("b")
    assert torch.equal(2 * one["3.weight"], two["3.weight"])


def test_counts_are_k_networks_and_k_numbers_for_each_task() -> None:
    """The example of the specification: an actor of three hidden layers, ten tasks, five bases."""
    actor = nn.Sequential(
        nn.Linear(12, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400),
        nn.ReLU(), nn.Linear(400, 4),
    )  # fmt: skip
    model = weft.MultiTaskModel(actor, weft.paco(actor, k=5))
    for i in range(10):
        model.add_task(f"t{i}", weft.Task(None, nn.functional.mse_loss))
    n = sum(p.numel() for p in actor.parameters())
    ledgers = [model.ledger(t) for t in model.task_names]
    assert {led.own_parameters for led in ledgers} == {5}
    assert {led.shared_parameters for led in ledgers} == {5 * n}
    total = ledgers[0].shared_parameters + sum(led.own_parameters for led in ledgers)
    assert total == 5 * n + 5 * 10 == 1_638_070
    assert round(total / (10 * n), 3) == 0.5


def test_fold_is_the_base_with_the_mixture_in_it() -> None:
    base = net()
    model = model_of(base=base, noise=1.0).eval()
    folded = model.fold("a")
    assert type(folded) is type(base)
    assert folded.state_dict().keys() == base.state_dict().keys()
    x = torch.randn(4, 5)
    assert torch.equal(model.head("a")(folded(x)), model(x, task="a"))


# ------------------------------------------------------------------------------------ new tasks


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def test_a_new_task_trains_its_numbers_over_the_bases_of_the_others(tmp_path: Path) -> None:
    base = net()
    model = model_of(base=base, k=4, norms="shared")
    weft.fit(model, data(), epochs=3, lr=0.1, progress=False)
    plan = weft.paco(base, k=4, norms="shared", bases="given")
    assert plan.only_owns
    model.add_task("new", weft.Classification(3), sharing=plan)
    assert set(model.trainable("new")) == {COEFFICIENTS}
    assert model.ledger("new").own_parameters == 4
    before = snapshot(model)
    weft.fit(model, {"new": data("n")["n"]}, epochs=3, lr=0.1, progress=False)  # no subset=True
    after = snapshot(model)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.startswith("tasks.new.") for k in changed)
    assert f"tasks.new.own.{COEFFICIENTS}" in changed
    x = torch.randn(3, 5)
    model.eval()
    bank = weft.Bank(tmp_path)
    bank.save(model)
    loaded = bank.load(base).eval()
    assert loaded.task_names == ("a", "b", "new")
    for task in loaded.task_names:
        assert torch.equal(loaded(x, task=task), model(x, task=task))
    mixed = loaded(x, task=["new", "a", "new"])
    assert torch.allclose(mixed[0], loaded(x, task="new")[0], atol=1e-6)


def test_bases_are_constants_to_a_task_that_is_given_them() -> None:
    base = net()
    model = model_of(base=base)
    model.add_task("new", weft.Classification(3), sharing=weft.paco(base, bases="given"))
    model.step({"new": torch.randn(4, 5)}).outputs["new"].sum().backward()
    assert numbers(model, "new").grad is not None
    assert all(p.grad is None for p in model.shared_trainable().values())


@pytest.mark.parametrize(("plan", "found"), [("taps", "none"), ("paco", "5")])
def test_bases_that_are_not_there_are_refused(plan: str, found: str) -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.method(plan, base), example=torch.zeros(2, 5))
    given = weft.paco(base, k=3, bases="given")
    with pytest.raises(PlanError, match=f"mixes 3 bases of '0.weight', and its model has {found}"):
        model.add_task("new", weft.Classification(3), sharing=given)


# ------------------------------------------------------------------------------ tasks that diverge


def broken(where: Iterable[int]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Three regressions; in some batches the targets of task c are far off or no numbers."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {t: [] for t in "abc"}
    for task in "abc":
        for i in range(4):
            x = torch.randn(8, 5, generator=generator)
            y = x.sum(1) * (1e6 if task == "c" and i in where else 1.0)
            found[task].append((x, y))
    return found


def regressions(**options: Any) -> Any:
    base = net()
    model = weft.MultiTaskModel(base, weft.paco(base, **options), example=torch.zeros(2, 5))
    for seed, task in enumerate("abc"):
        torch.manual_seed(seed)
        model.add_task(task, weft.Task(nn.Linear(8, 1), squared))
    return model


def squared(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, whatever the targets are."""
    return (output[:, 0] - target).square().mean()


@pytest.mark.filterwarnings("ignore:No step of epoch 1 counted for 'c'")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_loss_over_the_limit_does_not_count(bad: float) -> None:
    """The others go on as if the task had not been in the step."""
    model = regressions(k=3, limit=100.0)
    alone = regressions(k=3, limit=100.0)
    sick = {t: of[:1] for t, of in broken(()).items()}
    sick["c"] = [(sick["c"][0][0], torch.full((8,), bad))]
    weft.fit(model, sick, epochs=1, lr=0.1, momentum=0.0, progress=False)
    healthy = {t: sick[t] for t in "ab"}
    weft.fit(alone, healthy, epochs=1, lr=0.1, momentum=0.0, progress=False, subset=True)
    for key, value in alone.shared_trainable().items():
        assert torch.equal(model.shared[key], value), key
    for task in "ab":
        assert torch.equal(numbers(model, task), numbers(alone, task))
    head, other = model.head("c").state_dict(), alone.head("c").state_dict()
    assert all(torch.equal(head[k], other[k]) for k in head)


@pytest.mark.parametrize("norms", ["private", "shared"])
def test_a_step_that_does_not_count_leaves_statistics_alone(norms: Any) -> None:
    base, x = normed(), torch.randn(2, 2, 4, 4)
    model = weft.MultiTaskModel(base, weft.paco(base, k=2, limit=1e3, norms=norms), example=x)
    model.add_task("a", weft.Classification(3))
    model.add_task("b", weft.Classification(3))
    good = [(torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    sick = [good[0], (good[1][0] * float("nan"), good[1][1]), good[2]]
    weft.fit(model, {"a": sick, "b": good}, epochs=1, progress=False)
    counted = [buffer for name, buffer in model.named_buffers() if "num_batches" in name]
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    # The base's own statistics train where they are shared; else each task counts its steps.
    steps = {"private": {0, 2, 3}, "shared": {4}}[norms]
    assert {int(count) for count in counted} == steps


def test_a_limit_under_every_loss_is_told() -> None:
    model = regressions(k=3, limit=1e-9)
    with pytest.warns(DataWarning, match=r"No step of epoch 1 counted for 'a'.*limit.*1e-09"):
        weft.fit(model, broken(()), epochs=1, progress=False)


def test_without_a_limit_such_a_loss_ends_the_run() -> None:
    model = regressions(k=3)
    sick = broken(())
    sick["c"][1] = (sick["c"][1][0], torch.full((8,), float("nan")))
    with pytest.raises(TrainingError, match="loss of 'c' at step 1 is nan"):
        weft.fit(model, sick, epochs=1, progress=False)


@pytest.mark.parametrize("reset", ["interpolate", "copy"])
def test_its_numbers_come_from_those_of_healthy_tasks(reset: Any) -> None:
    model = regressions(k=3)
    with torch.no_grad():
        for task, row in zip("abc", torch.eye(3), strict=True):
            numbers(model, task).copy_(row)
    before = {t: numbers(model, t).detach().clone() for t in "abc"}
    drawn = set()
    for seed in range(6):
        act = ResetCoefficients(reset, seed)
        (changed,) = act(model, Taken(broken(()), frozenset("c"), 0.5))
        assert changed is numbers(model, "c")
        assert torch.equal(numbers(model, "a"), before["a"])
        assert torch.equal(numbers(model, "b"), before["b"])
        one, two, three = numbers(model, "c").tolist()
        assert three == 0.0
        assert one + two == pytest.approx(1.0)
        assert min(one, two) >= 0.0
        assert reset == "interpolate" or {one, two} == {0.0, 1.0}
        drawn.add((one, two))
    assert len(drawn) > 1
    assert act(model, Taken(broken(()), frozenset("abc"), 0.5)) is None
    assert act(model, Taken(broken(()), frozenset(), 0.5)) is None


def test_training_resets_and_goes_on() -> None:
    """The optimiser forgets the old numbers, and a task that recovers is trained again."""
    seen: list[float] = []
    model = regressions(k=3, limit=1e4)
    start = copy.deepcopy(numbers(model, "c").detach())

    def watch(epoch: Any) -> None:
        seen.append(epoch.rows["c"]["loss"])

    history = weft.fit(
        model, broken({1}), epochs=6, lr=0.02, callbacks=[watch], progress=False, keep="last"
    )
    assert all(row["loss"] > 1e6 for row in history["c"])  # the loss that was refused is reported
    assert history["a"][-1]["loss"] < history["a"][0]["loss"] < 1e2
    assert not torch.equal(numbers(model, "c"), start)
    assert bool(torch.isfinite(numbers(model, "c")).all())


def test_the_optimiser_forgets_the_numbers_that_were_replaced() -> None:
    forgotten: list[bool] = []
    model = regressions(k=3, limit=1e4)

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            forgotten.append(numbers(model, "c") not in self.state)
            super().step(closure)

    weft.fit(
        model, broken({1}), epochs=1, lr=0.02, progress=False,
        optimizer=lambda groups: Watched(groups, momentum=0.9),
    )  # fmt: skip
    assert forgotten == [True, False, True, False]  # never used yet, known, replaced, known


def test_numbers_take_no_weight_decay() -> None:
    model = model_of()
    groups = weft.training.optimization.parameter_groups(model, "ab", lr=0.1, weight_decay=0.1)
    mine = {id(numbers(model, t)) for t in "ab"}
    for group in groups:
        if mine & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == 0.0


# ------------------------------------------------------------------------------------- the laws

BASES = ("convolutions", "residual", "tied", "custom")
OF_ALL = [w for w in LAWS if w not in (*ISOLATED, *LAWS[:2])] + OF_PATCHES


@pytest.mark.parametrize("law", OF_ALL, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        case
        for options in ({"softmax": True, "norms": "shared"}, {"k": 1, "noise": 0.1})
        for case in variants("paco", **options)
        if case.base.name in BASES
    ],
    ids=str,
)
def test_options_keep_the_laws(case: Variant, law: Any) -> None:
    law(case)
