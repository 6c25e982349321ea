"""BoRA: the prior's formula, its limits, and that training finds the most probable tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.core.structure import SLOT
from weft.errors import BankError, PlanError
from weft.methods.bora import MEAN
from weft.penalties import TieToMean


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))


def rows(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 5, generator=generator)
    return [(x, (x[:, seed % 5] > 0).long())]


def trained(plan: weft.Sharing, base: nn.Module, **options: Any) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, 5))
    torch.manual_seed(1)
    for name in "ab":
        model.add_task(name, weft.Classification(2))
    data = {"a": rows(0), "b": rows(1)}
    settings = {"epochs": 5, "lr": 0.01, "optimizer": "adamw", "progress": False, **options}
    weft.fit(model, data, **settings)
    return model


def test_tau_0_is_lora_for_each_task_alone_bit_for_bit() -> None:
    base = net()
    tied, free = weft.bora(base, tau=0, r=2), weft.lora(base, r=2, alpha=16)
    assert not tied.created
    assert not tied.penalties
    one, other = trained(tied, base), trained(free, base)
    for name in "ab":
        for key, tensor in one.tasks[name].own.items():
            assert torch.equal(tensor, other.tasks[name].own[key])


def test_the_mean_is_not_used_in_the_forward_and_tasks_start_as_the_base() -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.bora(base, tau=10, r=2), example=torch.zeros(1, 5))
    model.add_task("a", weft.Classification(2))
    x = torch.randn(3, 5)
    assert torch.equal(model.view("a")(x), base(x))
    with torch.no_grad():
        for key, tensor in model.shared.items():
            if key.startswith(MEAN):
                tensor.add_(1.0)
    assert torch.equal(model.view("a")(x), base(x))


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_the_charge_and_its_gradients_are_the_formula(form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 3), "B": (4,)}

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    own = {t: {k: draw(s) for k, s in shapes.items()} for t in "xyz"}
    means = {MEAN + k: draw(s) for k, s in shapes.items()}
    charge = TieToMean(3.0, tuple(shapes), MEAN, form)({t: {} for t in own}, own, means)
    charge.backward()
    expected, by_mean = 0.0, {k: np.zeros(s) for k, s in shapes.items()}
    for tensors in own.values():
        for key in shapes:
            apart = (tensors[key] - means[MEAN + key]).detach().numpy()
            size = np.sqrt((apart**2).sum())
            expected += 1.5 * size**2 if form == "squared" else 3.0 * size
            pull = 3.0 * apart if form == "squared" else 3.0 * apart / size
            np.testing.assert_allclose(tensors[key].grad, pull)
            by_mean[key] -= pull
    assert float(charge.detach()) == pytest.approx(expected)
    for key, pull in by_mean.items():
        np.testing.assert_allclose(means[MEAN + key].grad, pull)


def test_the_norm_has_a_gradient_of_0_where_nothing_is_apart() -> None:
    own, mean = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    TieToMean(1.0, ("w",), MEAN, "norm")(
        {"t": {}}, {"t": {"w": own}}, {MEAN + "w": mean}
    ).backward()
    assert own.grad is not None
    assert torch.equal(own.grad, torch.zeros(3))


def test_a_large_tau_is_one_adapter_for_all() -> None:
    base = net()
    apart = {}
    for tau in (0.01, 1e4):
        model = trained(weft.bora(base, tau=tau, r=2), base, epochs=300, lr=0.01)
        a, b = (model.tasks[name].own for name in "ab")
        apart[tau] = sum(float((a[k] - b[k]).detach().square().sum()) for k in a) ** 0.5
        for key, tensor in model.shared.items():
            if key.startswith(MEAN) and tau > 1:
                middle = (a[key.removeprefix(MEAN)] + b[key.removeprefix(MEAN)]) / 2
                torch.testing.assert_close(tensor, middle, atol=1e-2, rtol=0)
    assert apart[1e4] < 1e-2 < apart[0.01]


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output.squeeze(1) - target).square().mean()


# T tasks make the charge curve by up to (T + 1) tau / rows, rows = 17: SGD stays under 2 over it.
@pytest.mark.parametrize(
    ("tau", "optimizer", "lr"),
    [
        (0.5, "adamw", 0.03),
        pytest.param(100.0, "adamw", 0.03, marks=pytest.mark.slow),
        pytest.param(1e4, "sgd", 0.0014, marks=pytest.mark.slow),
    ],
)
def test_training_finds_the_most_probable_tensors_of_linear_gaussian_tasks(
    tau: float, optimizer: Any, lr: float
) -> None:
    """y = X theta + noise of deviation 1, theta ~ N(Theta, I / tau): solved exactly beside it."""
    generator = np.random.default_rng(0)
    size, counts = 4, {"few": 3, "some": 8, "many": 40}
    data = {}
    for name, count in counts.items():
        x = generator.normal(size=(count, size))
        theta = 1.0 + 0.5 * generator.normal(size=size)
        data[name] = (x, x @ theta + generator.normal(size=count))
    # (X'X + tau) theta_t = X'y + tau Theta and Theta = mean theta_t, as one linear system.
    places = {name: slice(i * size, (i + 1) * size) for i, name in enumerate(counts)}
    system, right = np.zeros((4 * size, 4 * size)), np.zeros(4 * size)
    mean = slice(3 * size, 4 * size)
    for name, (x, y) in data.items():
        at = places[name]
        system[at, at], right[at] = x.T @ x + tau * np.eye(size), x.T @ y
        system[at, mean], system[mean, at] = -tau * np.eye(size), -np.eye(size) / 3
    system[mean, mean] = np.eye(size)
    solved = np.linalg.solve(system, right)

    base = nn.Sequential(nn.Linear(size, 1, bias=False))
    nn.init.zeros_(base[0].weight)
    average = np.mean(list(counts.values()))
    plan = weft.tie_to_mean(weft.full_finetune(base), base, tau, rows=float(average))
    model = weft.MultiTaskModel(base, plan, example=torch.zeros(1, size))
    for name in counts:
        model.add_task(name, weft.Task(head=nn.Identity(), loss=half_squares))
    batches = {
        n: [(torch.tensor(x).float(), torch.tensor(y).float())] for n, (x, y) in data.items()
    }
    weights = {name: float(count / average) for name, count in counts.items()}
    weft.fit(model, batches, epochs=1000, lr=lr, optimizer=optimizer, weights=weights,
             keep="last", progress=False)  # fmt: skip
    for name, at in places.items():
        found = model.tasks[name].own["0.weight"].detach().numpy().ravel()
        np.testing.assert_allclose(found, solved[at], atol=3e-2)
    theta = model.shared[MEAN + "0.weight"].detach().numpy().ravel()
    np.testing.assert_allclose(theta, solved[mean], atol=3e-2)


def test_any_own_tensors_can_be_tied_and_are_stored(tmp_path: Path) -> None:
    base = net()
    plan = weft.tie_to_mean(weft.bias_only(base), base, 5.0)
    assert set(plan.created) == {MEAN + "0.bias", MEAN + "2.bias"}
    assert plan.options["tie_to_mean"]["tau"] == 5.0
    model = trained(plan, base)
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model)
    loaded = bank.load(base)
    x = torch.randn(3, 5)
    assert torch.equal(loaded.eval()(x, task="b"), model.eval()(x, task="b"))
    for key, tensor in model.shared.items():
        assert torch.equal(loaded.shared[key], tensor)


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_a_new_task_is_tied_to_the_mean_of_the_others_which_stays(form: Any) -> None:
    """With data that says nothing, the new task ends at the mean."""
    base = net()
    model = trained(weft.bora(base, tau=1.0, r=2, form=form), base)
    torch.manual_seed(2)
    given = weft.bora(base, tau=1.0, r=2, form=form, mean="given")
    model.add_task("new", weft.Task(head=nn.Identity(), loss=nothing), sharing=given)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    own = {k: t.detach().clone() for k, t in model.tasks["new"].own.items()}
    weft.fit(model, {"new": rows(0)}, epochs=200, lr=0.05, momentum=0.0, progress=False)
    for key, tensor in model.state_dict().items():
        assert key.startswith("tasks.new.") or torch.equal(tensor, before[key]), key
    for key, start in own.items():
        mean = model.shared[MEAN + key]
        assert mean.grad is None
        assert (start - mean).norm() > 0.01
        torch.testing.assert_close(model.tasks["new"].own[key], mean, atol=0.05, rtol=0)


def nothing(output: Tensor, target: Tensor) -> Tensor:  # noqa: ARG001
    return 0.0 * output.sum()


def test_a_stored_task_with_a_given_mean_trains_on_by_its_own_plan(tmp_path: Path) -> None:
    base = net()
    plans = [weft.bora(base, r=2, mean=mean) for mean in ("trained", "given")]  # type: ignore[arg-type]
    model = trained(plans[0], base)
    model.add_task("new", weft.Classification(2), sharing=plans[1])
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model)
    with pytest.raises(PlanError, match="or a list of plans"):
        weft.fit(bank.load(base), {"new": rows(2)}, epochs=1, progress=False)
    loaded = bank.load(base, sharing=plans)
    assert [loaded.plan(task) for task in ("a", "b", "new")] == [plans[0], plans[0], plans[1]]
    for one in (model, loaded):
        weft.fit(one, {"new": rows(2)}, epochs=2, progress=False)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with pytest.raises(BankError, match="found an empty list"):
        bank.load(base, sharing=[])


@pytest.mark.parametrize(
    ("plan", "found"), [("lora", "has none"), ("bora", r"has one of shape \(4, 5\)")]
)
def test_a_mean_that_is_not_there_is_refused(plan: str, found: str) -> None:
    base = net()
    model = weft.MultiTaskModel(base, weft.method(plan, base, r=4), example=torch.zeros(1, 5))
    given = weft.bora(base, r=2, mean="given")
    assert given.only_owns
    with pytest.raises(PlanError, match=rf"mean of shape \(2, 5\) for .* and its model {found}"):
        model.add_task("new", weft.Classification(2), sharing=given)


# -------------------------------------------------- the mean as a branch beside those of the tasks


class Mixed(nn.Module):
    """A convolution, attention (whose weights are patched) and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x[:, None]).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.last(y.mean(1))


def joined(base: nn.Module, **options: Any) -> weft.MultiTaskModel:
    torch.manual_seed(0)
    plan = weft.bora(base, joined=True, r=2, **options)
    model = trained(plan, base, epochs=20)
    return model.eval()


def test_joined_branches_are_added_to_the_weights_and_fold_into_them() -> None:
    """W + s B A + s B' A' with the shared factors A' and B', for every kind of site."""
    torch.manual_seed(0)
    base = Mixed().eval()
    model = joined(base, tau=0.1)
    own, shared = model.tasks["a"].own, model.shared
    assert all(float(t.detach().abs().sum()) > 0 for t in own.values())
    folded, scale = model.fold("a"), 16 / 2
    keys = [key for key in shared if key.endswith("common_A")]
    assert len(keys) == len(own) // 2 == 4
    for key in keys:
        site = key.removesuffix("common_A")
        a, b = own[site + "A"], own[site + "B"]
        product = b.flatten(1) @ a.flatten(1)
        product = product + shared[site + "common_B"].flatten(1) @ shared[key].flatten(1)
        name = site.removesuffix(SLOT)
        name = name if name in dict(base.named_parameters()) else f"{name}.weight"
        weight = base.get_parameter(name)
        expected = weight + scale * product.view_as(weight)
        torch.testing.assert_close(folded.get_parameter(name), expected)
    x = torch.randn(6, 5)
    torch.testing.assert_close(folded(x), model.view("a")(x))
    rows_of = ["a", "b", "a", "a", "b", "b"]
    mixed = model(x, task=rows_of)
    for i, name in enumerate(rows_of):
        torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1], task=name))
    for name, y in model.predict_all(x).items():
        torch.testing.assert_close(y, model(x, task=name))


def test_joined_branches_come_back_from_a_bank_bit_for_bit(tmp_path: Path) -> None:
    base = Mixed().eval()
    model = joined(base, tau=0.1)
    bank = weft.Bank(tmp_path / "bank")
    bank.save(model)
    loaded, x = bank.load(base).eval(), torch.randn(4, 5)
    for name in "ab":
        assert torch.equal(loaded(x, task=name), model(x, task=name))
    assert loaded.sharing.trains_shared


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_joined_tasks_are_charged_for_their_own_branches_alone(form: Any) -> None:
    base = net()
    model = joined(base, tau=3.0, form=form, rows=2.0)
    sizes = [float(t.detach().square().sum()) for t in model.tasks["a"].own.values()]
    # tau / rows is 1.5: half of it for each square, all of it for each norm.
    expected = sum(0.75 * s if form == "squared" else 1.5 * s**0.5 for s in sizes)
    assert float(model.penalty("a").detach()) == pytest.approx(expected)


def test_joined_tasks_under_a_large_tau_share_one_branch() -> None:
    base, x = net(), torch.randn(5, 5)
    plan = weft.bora(base, joined=True, tau=1e3, r=2)
    model = trained(plan, base, epochs=300, lr=0.01).eval()
    a, b = (model.view(name)(x) for name in "ab")
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert float((a - base(x)).detach().abs().max()) > 0.1


def test_joined_tasks_train_together_or_on_demand() -> None:
    base = net()
    model = joined(base, tau=1.0)
    with pytest.raises(PlanError, match="subset=True"):
        weft.fit(model, {"a": rows(0)}, epochs=1, progress=False)
    with pytest.raises(PlanError, match="has no mean to give"):
        weft.bora(base, joined=True, mean="given")
    alone = weft.bora(base, joined=True, tau=0, r=2)
    assert not alone.trains_shared
    assert not alone.penalties


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": "known"}, "'trained' or 'given'"),
        ({"tau": "10"}, r"bora\(tau=...\) is a number >= 0"),
        ({"rows": None}, r"rows=...\) is a positive number"),
        ({"joined": "no"}, r"bora\(joined=...\) is True or False"),
        ({"tau": -1.0}, r"bora\(tau=...\) is a number >= 0"),
        ({"tau": float("inf")}, r"bora\(tau=...\) is a number >= 0"),
        ({"rows": 0.0}, r"rows=...\) is a positive number"),
        ({"form": "cubed"}, "'squared' or 'norm'"),
        ({"r": 0}, "rank of 1 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        weft.bora(net(), **options)


def test_gated_tensors_are_tied_until_their_gates_are_final() -> None:
    base = net()
    plan = weft.tie_to_mean(weft.taps(base, penalty=0.001), base, 1.0)
    model = trained(plan, base)
    assert model.ledger("a").open_gates == (2, 2)
    assert model.penalty("a") == 0
    weft.fit(model, {"a": rows(0), "b": rows(1)}, epochs=1, progress=False)


def test_plans_that_share_trained_tensors_are_not_tied() -> None:
    base = net()
    with pytest.raises(PlanError, match="'hard_sharing' share trained tensors"):
        weft.tie_to_mean(weft.hard_sharing(base), base, 1.0)
