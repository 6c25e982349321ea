"""DiSparse: scores, the arbiter, sparsity that stays, dropping and growing, and what it saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import weft
from laws.variants import ISOLATED, LAWS, OF_PATCHES, Variant, name_of, variants
from weft.core.masks import head_key, head_weights, masked, shared_key
from weft.core.sharing import Taken
from weft.core.sites import layer_weights
from weft.errors import DataWarning, PlanError
from weft.methods.growth import DropAndGrow, KeepDensities, RandomMasks, erk, largest
from weft.methods.sparsity import Prune, all_weights, arbitrate, overlap, places, zeros

Data = Mapping[str, list[tuple[Tensor, Tensor]]]


def net(seed: int = 0) -> nn.Sequential:
    """Convolutions with batch normalisation, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 16),
    )  # fmt: skip


def data(batches: int = 3, tasks: str = "ab") -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Batches of six images, three classes."""
    generator = torch.Generator().manual_seed(5)
    return {
        task: [
            (
                torch.randn(6, 3, 6, 6, generator=generator),
                torch.randint(3, (6,), generator=generator),
            )
            for _ in range(batches)
        ]
        for task in tasks
    }


def model_of(tasks: str = "ab", base: nn.Module | None = None, **options: Any) -> Any:
    """A model with a plan of DiSparse."""
    base = net() if base is None else base
    model = weft.MultiTaskModel(
        base, weft.disparse(base, **options), example=torch.zeros(2, 3, 6, 6)
    )
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        model.add_task(task, weft.Classification(3))
    return model


def train(model: Any, epochs: int = 4, **more: Any) -> weft.History:
    """A short run, with all that could move a weight away from zero."""
    given = {"lr": 0.05, "weight_decay": 0.01, "clip": 1.0, "progress": False, **more}
    return weft.fit(model, data(), epochs=epochs, **given)


def weights_and_masks(model: Any) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Every prunable weight with its mask, read without the method's own means."""
    found = {}
    for name in layer_weights(model.base):
        found["", name] = (model.base.get_parameter(name), model.shared[shared_key(name)])
    for task in model.task_names:
        for name, weight in head_weights(model.head(task)).items():
            found[task, name] = (weight, model.tasks[task].own[head_key(name)])
    return found


def share_of_zeros(model: Any) -> float:
    weights = [w.detach() for w, _ in weights_and_masks(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# -------------------------------------------------------------------------------- the plan


def test_convolutions_and_linear_layers_are_masked_and_nothing_else() -> None:
    plan = weft.disparse(net())
    assert plan.masked == {"0.weight", "3.weight", "6.weight"}
    assert plan.train_shared == set(net().state_dict())
    assert not plan.patches
    private = weft.disparse(net(), batchnorm="private")
    assert {n.split(".")[0] for n in private.patches} == {"1"}


def test_masks_begin_as_ones_and_belong_to_the_model_and_to_each_head() -> None:
    model = model_of()
    assert all(bool(mask.all()) for _, mask in weights_and_masks(model).values())
    assert all(mask.dtype == torch.bool for _, mask in weights_and_masks(model).values())
    assert [name for _, name in all_weights(model, layer_weights(model.base))] == [
        "0.weight", "3.weight", "6.weight", "head:linear.weight", "head:linear.weight"
    ]  # fmt: skip


def test_without_sparsity_it_is_hard_sharing_bit_for_bit() -> None:
    sparse = model_of(sparsity=0.0)
    base = net()
    plan = weft.hard_sharing(base, own="nothing", batchnorm="follow")
    dense = weft.MultiTaskModel(base, plan, example=torch.zeros(2, 3, 6, 6))
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        dense.add_task(task, weft.Classification(3))
    train(sparse)
    train(dense)
    expected = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dense": 1.0}, r"dense=...\) is a number in \[0, 1\), found 1.0"),
        ({"explore": 1.0}, r"explore=...\) is a number in \(0, 1\), found 1.0"),
        ({"explore": 0}, r"explore=...\) is a number in \(0, 1\), found 0"),
        ({"drop": 0.0}, r"drop=...\) is a number in \(0, 1\], found 0.0"),
        ({"power": -0.1}, r"power=...\) is a number >= 0, found -0.1"),
        ({"seed": 0.5}, r"seed=...\) is a whole number of 64 bits, found 0.5"),
        ({"sparsity": 1.0}, r"sparsity=...\) is a number in \[0, 1\), found 1.0"),
        ({"variant": "statics"}, "'static' or 'pretrained' or 'dynamic', found 'statics'"),
        ({"score": "snip"}, "'saliency' or 'magnitude' or 'taylor', found 'snip'"),
        ({"variant": "dynamic", "score": "taylor"}, "leave out score='taylor'"),
        ({"batches": 0}, "whole number of at least 1, found 0"),
        ({"dense": 1.0}, "dense"),
        ({"explore": 0.0}, "explore"),
        ({"every": 0}, "every"),
        ({"drop": 0.0}, "drop"),
        ({"regrow": "old"}, "'zero' or 'stale', found 'old'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        weft.disparse(net(), **options)


def test_a_base_without_weights_to_prune_is_refused() -> None:
    with pytest.raises(PlanError, match=r"disparse prunes the weights of .* this base has none"):
        weft.disparse(nn.BatchNorm2d(3))


# ----------------------------------------------------------------------------------- scores


def prune(model: Any, **options: Any) -> Prune:
    given: dict[str, Any] = {
        "sparsity": 0.8, "score": "saliency", "batches": 50, "weights": "own", "seed": 0, **options
    }  # fmt: skip
    return Prune(layer_weights(model.base), **given)


def test_saliency_is_the_derivative_of_the_loss_by_the_mask() -> None:
    """Central differences of the loss by single entries of a mask, in double precision."""
    model = model_of().double()
    batches = {t: [(x.double(), y) for x, y in of] for t, of in data(2).items()}
    scores = prune(model).scores(model, batches)
    base = net().double().train()
    state = {n: t.detach() for n, t in model.tensors("a").items()}
    head = dict(model.head("a").named_parameters())
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    found, expected = [], []
    for name in ("0.weight", "3.weight", "6.weight", "head:linear.weight"):
        mine = scores["a"][name].reshape(-1)
        for place in torch.randint(len(mine), (6,), generator=generator).tolist():
            total = 0.0
            for x, y in batches["a"]:
                losses = []
                for sign in (1, -1):
                    tensors, tuned = dict(state), dict(head)
                    table = tuned if name.startswith("head:") else tensors
                    key = name.removeprefix("head:")
                    changed = table[key].detach().clone()
                    changed.view(-1)[place] *= 1 + sign * step  # a mask of 1 + step at this place
                    table[key] = changed
                    buffers = {k: v.clone() for k, v in tensors.items()}
                    features = functional_call(base, buffers, (x,))
                    logits = functional_call(model.head("a"), tuned, (features,))
                    losses.append(nn.functional.cross_entropy(logits, y).item())
                total += abs(losses[0] - losses[1]) / (2 * step)
            found.append(float(mine[place]))
            expected.append(total)
    ratio = np.array(found) / np.array(expected)  # scores are normalised: one factor for all
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_scores_of_each_task_sum_to_one() -> None:
    model = model_of()
    for score in ("saliency", "magnitude", "taylor"):
        for scores in prune(model, score=score).scores(model, data()).values():
            assert sum(float(s.sum()) for s in scores.values()) == pytest.approx(1.0, abs=1e-5)


def test_magnitude_needs_no_data_and_taylor_is_gradient_times_square() -> None:
    model = model_of()
    with torch.no_grad():
        for weight, _ in weights_and_masks(model).values():
            weight += 0.01 * torch.randn(weight.shape)
    empty: Data = {"a": [], "b": []}
    magnitude = prune(model, score="magnitude").scores(model, empty)["b"]
    total = sum(float(w.detach().abs().sum()) for (t, _), (w, _) in weights_and_masks(model).items()
                if t in ("", "b"))  # fmt: skip
    weight = model.base.get_parameter("3.weight").detach()
    assert torch.allclose(magnitude["3.weight"], weight.abs() / total)
    saliency = prune(model).scores(model, data())["a"]["3.weight"]
    taylor = prune(model, score="taylor").scores(model, data())["a"]["3.weight"]
    ratio = taylor / (saliency * weight.abs())
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    prune(model, weights="xavier").scores(model, data())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_xavier_scores_are_those_of_other_weights() -> None:
    model = model_of()
    own = prune(model).scores(model, data())["a"]["0.weight"]
    one, two = (
        prune(model, weights="xavier").scores(model, data())["a"]["0.weight"] for _ in range(2)
    )
    assert torch.equal(one, two)
    assert not torch.allclose(own, one)


# -------------------------------------------------------------------------------- the arbiter


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_the_shared_mask_is_the_or_of_keeps_and_the_sparsity_is_global(sparsity: float) -> None:
    """Against masks found by bisection on rho, as numpy finds them from the same scores."""
    model = model_of("abc")
    batches = data(tasks="abc")
    pruning = prune(model, sparsity=sparsity)
    scores = pruning.scores(model, batches)
    flat = {t: np.concatenate([s.numpy().ravel() for s in of.values()]) for t, of in scores.items()}
    shared = sum(model.base.get_parameter(n).numel() for n in layer_weights(model.base))
    total = shared + sum(len(f) - shared for f in flat.values())

    def keeps(rho: float) -> tuple[int, dict[str, Any]]:
        found = {}
        for task, values in flat.items():
            best = np.argsort(-values, kind="stable")[: int(np.floor(rho * len(values) + 1e-9))]
            found[task] = np.zeros(len(values), dtype=bool)
            found[task][best] = True
        either = np.logical_or.reduce([k[:shared] for k in found.values()])
        return int(either.sum()) + sum(int(k[shared:].sum()) for k in found.values()), found

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle)[0] >= (1 - sparsity) * total else (middle, high)
    _, expected = keeps(high)
    either = np.logical_or.reduce([k[:shared] for k in expected.values()])

    pruning(model, batches)
    assert abs(share_of_zeros(model) - sparsity) <= 3 / total
    assert zeros(model) == pytest.approx(share_of_zeros(model))
    masks = weights_and_masks(model)
    mine = [masks["", n][1].numpy().ravel() for n in layer_weights(model.base)]
    assert (np.concatenate(mine) != either).sum() <= 3
    for task in "abc":
        own = masks[task, "linear.weight"][1].numpy().ravel()
        assert (own != expected[task][shared:]).sum() <= 3


def test_a_weight_goes_only_if_all_tasks_let_it_go() -> None:
    ranked = {
        "a": {"w": torch.tensor([0.1, 0.9, 1.0, 0.8]), "head:h": torch.tensor([0.2])},
        "b": {"w": torch.tensor([0.9, 0.3, 1.0, 0.7]), "head:h": torch.tensor([0.95])},
    }
    keep = arbitrate(ranked, 0.5)  # three of six
    assert keep["a"]["w"].tolist() == [True, False, False, False]
    assert keep["b"]["w"].tolist() == [False, True, False, False]
    assert keep["a"]["head:h"].tolist() == [True]
    assert keep["b"]["head:h"].tolist() == [False]


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.31, 0.5, 0.69, 0.72, 0.9])
def test_without_ties_the_number_of_zeros_is_the_nearest_that_there_is(sparsity: float) -> None:
    torch.manual_seed(0)
    places_of = torch.randperm(22).double().add(1).div(22)  # no two tasks have a place in common
    ranked = {
        "a": {"w": places_of[:8], "head:h": places_of[8:11]},
        "b": {"w": places_of[11:19], "head:h": places_of[19:]},
    }
    keep = arbitrate(ranked, sparsity)
    shared = keep["a"]["w"] | keep["b"]["w"]
    heads = sum(int(of["head:h"].sum()) for of in keep.values())
    zeros_of = 14 - int(shared.sum()) - heads
    assert abs(zeros_of - 14 * sparsity) <= 0.5


def test_places_order_the_weights_of_all_layers_together() -> None:
    scores = {"u": torch.tensor([[3.0, 0.0]]), "v": torch.tensor([5.0, 0.0])}
    found = places(scores, {name: torch.zeros_like(s) for name, s in scores.items()})
    assert found["u"].tolist() == [[0.5, 0.75]]  # equal scores in order
    assert found["v"].tolist() == [0.25, 1.0]
    sizes = {"u": torch.tensor([[9.0, 1.0]]), "v": torch.tensor([0.0, 2.0])}
    found = places(scores, sizes)
    assert found["u"].tolist() == [[0.5, 1.0]]  # of equal scores the larger weight goes before
    assert found["v"].tolist() == [0.25, 0.75]


def test_fitting_again_prunes_as_much_as_is_asked_for() -> None:
    """Weights that no loss feels any more score 0, as those that are zero already do."""
    model = model_of(sparsity=0.8)
    for _ in range(3):
        train(model, optimizer="adamw", clip=None)
        assert zeros(model) == pytest.approx(0.8, abs=0.01)


def test_masks_that_could_never_change_are_told() -> None:
    model = model_of(variant="dynamic", every=50)
    with pytest.warns(DataWarning, match="'explore' of 'a' looks .* every 50 steps and has 9, so"):
        train(model)


def test_zeros_and_overlap_are_of_masks() -> None:
    base = net()
    assert zeros(weft.MultiTaskModel(base, weft.disparse(base))) == 0.0
    other = weft.MultiTaskModel(base, weft.full_finetune(base))
    for function in (zeros, overlap):
        with pytest.raises(PlanError, match="the plan of this model is 'full_finetune'"):
            function(other)


def test_tasks_that_are_alike_keep_the_same_weights() -> None:
    model = model_of("ab")
    model.tasks["b"].head.load_state_dict(model.tasks["a"].head.state_dict())
    same = data()
    same["b"] = same["a"]
    prune(model, sparsity=0.7)(model, same)
    assert set(overlap(model).values()) == {1.0}
    other = model_of("ab")
    prune(other, sparsity=0.7)(other, data())
    assert list(overlap(other)) == ["0.weight", "3.weight", "6.weight"]
    assert all(0.0 < value < 1.0 for value in overlap(other).values())


# --------------------------------------------------------------------------- zeros stay zeros


OPTIONS: dict[str, dict[str, Any]] = {
    "static": {},
    "xavier": {"weights": "xavier"},
    "pretrained": {"variant": "pretrained"},
    "taylor": {"variant": "pretrained", "score": "taylor"},
    "at once": {"variant": "pretrained", "dense": 0.0},
    "dynamic": {"variant": "dynamic", "every": 1},
    "stale": {"variant": "dynamic", "every": 1, "regrow": "stale"},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_ends_at_the_sparsity_and_masks_say_where(
    options: dict[str, Any], optimizer: Any
) -> None:
    base = net()
    before = copy.deepcopy(base.state_dict())
    model = model_of(base=base, sparsity=0.75, **options)
    train(model, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.003)
    assert share_of_zeros(model) == pytest.approx(0.75, abs=0.01)
    for weight, mask in weights_and_masks(model).values():
        assert torch.equal(weight != 0, mask)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    x = torch.randn(4, 3, 6, 6)
    model.eval()
    folded = model.fold("a")
    assert torch.equal(model.head("a")(folded(x)), model(x, task="a"))
    again = train(model, epochs=4)  # training on ends as sparse
    assert len(again["a"]) == 4
    assert share_of_zeros(model) == pytest.approx(0.75, abs=0.01)


def test_dense_epochs_before_pruning_are_dense_and_are_not_kept() -> None:
    shares: list[float] = []
    model = model_of(sparsity=0.75, variant="pretrained", dense=0.5)
    pair = {t: (b, b) for t, b in data().items()}
    callback = [lambda epoch: shares.append(share_of_zeros(epoch.model))]
    history = weft.fit(model, pair, epochs=4, lr=1e-6, callbacks=callback, progress=False)
    assert shares[:2] == [0.0, 0.0]
    assert shares[2:] == [pytest.approx(0.75, abs=0.01)] * 2
    assert min(history.best.values()) >= 2


def test_a_run_that_stops_before_pruning_is_pruned_at_its_end() -> None:
    for variant in ("pretrained", "dynamic"):
        model = model_of(sparsity=0.75, variant=variant, every=1)
        train(model, callbacks=[lambda epoch: epoch.stop()])
        masks = [mask for _, mask in weights_and_masks(model).values()]
        kept = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        assert kept == pytest.approx(0.25, abs=0.01)
        for weight, mask in weights_and_masks(model).values():
            assert not bool(weight[~mask].any())  # what was grown last is zero and may train


@pytest.mark.parametrize("variant", ["static", "pretrained", "dynamic"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_never_stopped(
    variant: str, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def interrupt(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stop

    options = {"sparsity": 0.75, "variant": variant, "every": 2}
    whole = model_of(**options)
    train(whole, checkpoint=tmp_path / "whole")
    halves = model_of(**options)
    with pytest.raises(Stop):
        train(halves, checkpoint=tmp_path / "halves", callbacks=[interrupt])
    resumed = model_of(**options)
    train(resumed, checkpoint=tmp_path / "halves")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(),
                                  strict=True):  # fmt: skip
        assert torch.equal(one, other), name


def test_gradients_that_masks_leave_out_do_not_count_when_gradients_are_clipped() -> None:
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for weight, mask in masked(model, "ab"):
                assert not bool(weight.grad[~mask].any())
            gradients = [p.grad for g in self.param_groups for p in g["params"]]
            seen.append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))
            super().step(closure)

    model = model_of(sparsity=0.9)
    train(model, epochs=1, clip=1e-3, optimizer=lambda groups: Watched(groups))
    assert seen == [pytest.approx(1e-3, rel=1e-3)] * 3


# --------------------------------------------------------------------------- drop and grow


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("power", [0.0, 0.9, 1.0])
def test_densities_are_those_of_the_formula(density: float, power: float) -> None:
    """Against the scale found by bisection, with densities cut at one."""
    sizes = {"stem": (16, 3, 7, 7), "deep": (64, 64, 3, 3), "wide": (10, 64), "one": (4, 1)}
    found = erk(sizes, density, power)
    count = {n: float(np.prod(s)) for n, s in sizes.items()}
    raw = {n: (sum(s) / count[n]) ** power for n, s in sizes.items()}
    low, high = 0.0, 1e9
    for _ in range(200):
        scale = (low + high) / 2
        mass = sum(min(1.0, scale * raw[n]) * count[n] for n in sizes)
        low, high = (scale, high) if mass < density * sum(count.values()) else (low, scale)
    for name in sizes:
        assert found[name] == pytest.approx(min(1.0, low * raw[name]), rel=1e-6)
    mass = sum(found[n] * count[n] for n in sizes)
    assert mass == pytest.approx(density * sum(count.values()))


def review(model: Any, **options: Any) -> DropAndGrow:
    given: dict[str, Any] = {"sparsity": 0.75, "power": 0.9, "drop": 0.5, "stale": False, **options}
    names = layer_weights(model.base)
    RandomMasks(names, 0.75, 0.9, 0)(model, {})
    return DropAndGrow(names, **given)


def taken(done: float = 0.5) -> Taken:
    return Taken({t: b[0] for t, b in data().items()}, frozenset(), done)


def test_random_masks_have_the_densities() -> None:
    model = model_of(sparsity=0.75)
    names = layer_weights(model.base)
    RandomMasks(names, 0.75, 0.9, 0)(model, {})
    found = weights_and_masks(model)
    sizes = {place: tuple(w.shape) for place, (w, _) in found.items()}
    expected = erk({str(p): s for p, s in sizes.items()}, 0.25, 0.9)
    for place, (weight, mask) in found.items():
        assert int(mask.sum()) == round(expected[str(place)] * weight.numel())
        assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("done", [0.1, 0.5, 1.0])
def test_layers_drop_their_smallest_and_each_task_grows_where_its_gradient_is(done: float) -> None:
    model = model_of(sparsity=0.75)
    act = review(model)
    before = {p: (w.detach().clone(), m.clone()) for p, (w, m) in weights_and_masks(model).items()}
    act(model, taken(done))
    zeta = 0.25 * (1 + np.cos(np.pi * done))
    dropped = copy.deepcopy(model)
    wanted: dict[str, dict[str, Tensor]] = {}
    stays: dict[tuple[str, str], Tensor] = {}
    for place, (weight, mask) in before.items():
        count = int(mask.sum())
        number = round(count * (1 - zeta))
        order = torch.where(mask, weight.abs(), -1.0).reshape(-1).argsort(descending=True)
        stay = torch.zeros(weight.numel(), dtype=torch.bool)
        stay[order[:number]] = True
        stays[place] = stay.view_as(mask)
        now = weights_and_masks(dropped)[place][0]
        with torch.no_grad():
            now.copy_(weight * stays[place])
    dropped.train()
    for task in "ab":
        x, y = data()[task][0]
        loss = nn.functional.cross_entropy(dropped(x, task=task), y)
        mine = {p: w for p, (w, _) in weights_and_masks(dropped).items() if p[0] in ("", task)}
        gradients = torch.autograd.grad(loss, list(mine.values()))
        for place, gradient in zip(mine, gradients, strict=True):
            missing = int(before[place][1].sum()) - int(stays[place].sum())
            score = torch.where(stays[place], -1.0, gradient.abs()).reshape(-1)
            grown = torch.zeros(score.numel(), dtype=torch.bool)
            grown[score.argsort(descending=True)[:missing]] = True
            wanted.setdefault(task, {})[place[0] + place[1]] = grown.view_as(stays[place])
    for place, (weight, mask) in weights_and_masks(model).items():
        task, name = place
        grown = [w[task + name] for w in wanted.values() if task + name in w]
        expected = stays[place] | torch.stack(grown).any(0)
        assert int((mask != expected).sum()) <= 1  # gradients are those of another forward
        assert torch.equal(weight.detach()[stays[place]], before[place][0][stays[place]])
        assert not bool(weight.detach()[~stays[place]].any())  # what is grown is zero
        if task:
            assert int(mask.sum()) == int(before[place][1].sum())  # heads keep their density


def test_stale_weights_take_up_the_values_that_they_had() -> None:
    model = model_of(sparsity=0.75, variant="dynamic", regrow="stale")
    act = review(model, stale=True, drop=1.0)
    before = {p: w.detach().clone() for p, (w, _) in weights_and_masks(model).items()}
    act(model, taken(0.0))  # everything is dropped, and some of it grown again
    came_back = 0
    for place, (weight, mask) in weights_and_masks(model).items():
        again = mask & (before[place] != 0)
        came_back += int(again.sum())
        assert torch.equal(weight.detach()[again], before[place][again])
        assert not bool(weight.detach()[~again].any())
    assert came_back > 0


def test_the_densities_return_at_the_end() -> None:
    model = model_of(sparsity=0.75)
    act = review(model)
    counts = {p: int(m.sum()) for p, (_, m) in weights_and_masks(model).items()}
    act(model, taken())
    grown = {p: int(m.sum()) for p, (_, m) in weights_and_masks(model).items()}
    assert any(grown[p] > counts[p] for p in counts if not p[0])  # the union is larger
    with torch.no_grad():
        for weight, mask in weights_and_masks(model).values():
            weight += 0.1 * torch.randn(weight.shape) * mask
    KeepDensities(layer_weights(model.base), 0.75, 0.9)(model, {})
    assert {p: int(m.sum()) for p, (_, m) in weights_and_masks(model).items()} == counts


def test_the_optimiser_remembers_nothing_of_weights_that_are_not_there() -> None:
    off: list[bool] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for weight, mask in masked(model, "ab"):
                for value in self.state.get(weight, {}).values():
                    if value.shape == weight.shape:
                        off.append(bool(value[~mask].any()))
            super().step(closure)

    model = model_of(sparsity=0.75, variant="dynamic", every=2)
    train(model, optimizer=lambda groups: Watched(groups))
    assert off
    assert not any(off)


def test_the_largest_are_as_many_as_can_be_had() -> None:
    values = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    among = torch.tensor([[False, True], [True, True]])
    assert largest(values, 2).tolist() == [[True, False], [True, False]]
    assert largest(values, 2, among=among).tolist() == [[False, False], [True, True]]
    assert largest(values, 9, among=among).tolist() == among.tolist()
    assert not bool(largest(values, 0).any())


# --------------------------------------------------------------------------------- what it saves


def test_files_leave_out_the_zeros_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(108, 200), nn.ReLU(), nn.Linear(200, 64))
    model = model_of(base=base, sparsity=0.9)
    train(model, epochs=1)
    bank = weft.Bank(tmp_path)
    bank.save(model)
    loaded = bank.load(base)
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(),
                                  strict=True):  # fmt: skip
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype, name
    stored = bank.ledger("a").stored
    assert stored is not None
    count = 108 * 200 + 200 * 64
    kept = sum(int((w != 0).sum()) for (t, _), (w, _) in weights_and_masks(model).items() if not t)
    biases = 4 * 264 + 4 * 2  # and the overlap of two layers
    assert stored.shared - (4 * kept + count / 8 + biases) < 2048  # masks cost no bits of their own
    assert stored.shared == (tmp_path / "shared").glob("*").__next__().stat().st_size
    assert stored.shared < 0.2 * 4 * count
    assert not bank.verify(base)
    with pytest.raises(PlanError, match="by code that a bank does not store"):
        train(loaded, epochs=1)
    further = bank.load(base, sharing=weft.disparse(base, sparsity=0.9))
    assert further.plan("a") is further.sharing
    train(further, epochs=1)
    assert share_of_zeros(further) == pytest.approx(0.9, abs=0.01)


def test_multiply_adds_of_zeros_are_counted_and_not_said_to_be_faster() -> None:
    model = model_of(sparsity=0.0)
    x = torch.randn(2, 3, 6, 6)
    full = weft.multiply_adds(model, x).of("a")
    assert weft.multiply_adds(model, x, skip_zeros=True).of("a") == full
    prune(model, sparsity=0.8)(model, data())
    assert weft.multiply_adds(model, x).of("a") == full
    expected = 0
    places_of = {"0.weight": 16, "3.weight": 4, "6.weight": 1, "linear.weight": 1}
    for (task, name), (weight, _) in weights_and_masks(model).items():
        if task in ("", "a"):
            expected += 2 * places_of[name] * int((weight != 0).sum())
    found = weft.multiply_adds(model, x, skip_zeros=True).of("a")
    assert found == pytest.approx(expected, abs=2)
    assert found < 0.5 * full


# ------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("law", [w for w in LAWS if w not in ISOLATED] + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in variants("disparse", variant="dynamic", regrow="stale", batchnorm="private")
        if case.base.name in ("convolutions", "residual", "tied", "custom")
    ],
    ids=str,
)
def test_options_keep_the_laws(case: Variant, law: Any) -> None:
    law(case)
