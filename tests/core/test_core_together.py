"""All tasks of one input: each as alone, bit for bit, and what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import weft
from weft.core.patch import Replace
from weft.core.sharing import Sharing
from weft.core.variants import TasksPartError, Variants
from weft.errors import DataError

WIDTH = 6
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
ROW = 2 * 3 * WIDTH * WIDTH  # operations of one linear layer on the three rows


def own(*names: str) -> Callable[[nn.Module], Sharing]:
    """A plan whose tasks own these tensors."""
    return lambda _: Sharing("own", patches={name: Replace() for name in names})


def model_of(base: nn.Module, *plans: Any, x: Any = X) -> weft.MultiTaskModel:
    """Tasks without heads, one for each plan; what each owns differs from the base."""
    torch.manual_seed(3)
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=x)
    for number, plan in enumerate(plans):
        name = f"t{number}"
        model.add_task(name, weft.Task(head=None, loss=nn.MSELoss()), sharing=plan(base))
        with torch.no_grad():
            for tensor in model.tasks[name].own.to_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor).abs())
    return model.eval()


def assert_as_alone(
    model: weft.MultiTaskModel, x: Any = X, tolerance: float = 0.0
) -> dict[str, Any]:
    """Every task's output is what it is alone, also in inference mode."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model.predict_all(x)
            alone = {name: model(x, task=name) for name in model.task_names}
        assert list(found) == list(alone)
        for name, output in alone.items():
            assert type(found[name]) is type(output)
            torch.testing.assert_close(found[name], output, rtol=tolerance, atol=tolerance)
    return found


def operations(model: weft.MultiTaskModel, x: Any = X) -> int:
    """What `predict_all` counts of matrix products, in those of one layer."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict_all(x)
    total = counter.get_total_flops()
    assert total % ROW == 0
    return total // ROW


class Residual(nn.Module):
    """Two blocks with a branch and a projection around it, joined in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch, self.around, self.last = (nn.Linear(WIDTH, WIDTH) for _ in "abcd")
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        out = self.branch(x)
        out += self.around(x)
        out = self.relu(out)
        return self.last(out)


@pytest.mark.parametrize("tasks", [2, 8, 32])
def test_tasks_that_differ_in_heads_cost_one_pass_of_the_trunk(tasks: int) -> None:
    base = Residual()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=X)
    for i in range(tasks):
        model.add_task(f"t{i}", weft.Task(nn.Linear(WIDTH, WIDTH), nn.MSELoss()))
    model.eval()
    assert_as_alone(model)
    assert operations(model) == 4 + tasks


@pytest.mark.parametrize(
    ("plans", "layers"),
    [
        ((own("last.weight"),) * 3, 3 + 3),
        ((own("around.weight"),) * 3, 2 + 3 + 3),  # the branch does not know of it
        ((own("branch.bias"),) * 3, 2 + 3 + 3),
        ((own("first.bias"),) * 3, 12),
        ((own("last.weight"), own("around.weight"), own()), 2 + 2 + 3),
        ((own("last.weight"), own("last.bias"), own(), own()), 3 + 3),
    ],
)
def test_what_lies_before_the_first_difference_is_computed_once(
    plans: tuple[Any, ...], layers: int
) -> None:
    model = model_of(Residual(), *plans)
    assert_as_alone(model)
    assert operations(model) == layers


def test_tasks_with_equal_own_tensors_share_their_work() -> None:
    model = model_of(Residual(), *(own("first.weight"),) * 4)
    with torch.no_grad():
        for name in ("t1", "t2"):
            model.tasks[name].own["first.weight"].copy_(model.tasks["t0"].own["first.weight"])
    assert operations(model) == 2 * 4
    with torch.no_grad():
        model.tasks["t1"].own["first.weight"].mul_(2.0)
    assert operations(model) == 3 * 4  # it is noticed that they differ now
    assert_as_alone(model)


@pytest.mark.parametrize(("name", "passes"), [("first.weight", 3), ("last.weight", 1)])
def test_tasks_that_share_hardly_anything_run_apart_once_that_is_known(
    name: str, passes: int
) -> None:
    calls: list[None] = []

    class Counted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(None)
            return super().forward(x)

    model = model_of(Counted(), *(own(name),) * 3)
    for expected in (1, passes, passes):
        calls.clear()
        with torch.no_grad():
            found = model.predict_all(X)
        assert len(calls) == expected
        with torch.no_grad():
            assert all(torch.equal(found[t], model(X, task=t)) for t in model.task_names)


class _Aliases(nn.Module):
    """Writes in place to memory that it reads again by another name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 2.0))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        kept, view = out, out[:, :2]
        if self.way == "augmented":
            out += self.second(x)
        elif self.way == "method":
            out.add_(self.second(x))
        elif self.way == "item":
            out[:, 0] = self.second(x)[:, 0]
        elif self.way == "out":
            torch.add(out, self.second(x), out=out)
        elif self.way == "divided":
            out = out * self.scale
            kept, view = out, out[:, :2]
            out += self.second(x)
        return torch.cat([kept, view], 1)


@pytest.mark.parametrize("way", ["augmented", "method", "item", "out", "divided"])
@pytest.mark.parametrize("names", [("second.weight",), ("scale",), ("scale", "second.bias")])
def test_writes_are_seen_by_every_name_of_the_memory(way: str, names: tuple[str, ...]) -> None:
    plans = [own(*names), own("second.weight"), own(names[0]), own()]
    assert_as_alone(model_of(_Aliases(way), *plans))


class _Doubled(torch.autograd.Function):
    """Has a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient * 2


class _Around(nn.Module):
    """Goes around torch's functions in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        if self.way == "function":
            return y + _Doubled.apply(y)  # type: ignore[no-untyped-call]
        if self.way == "overload":
            torch.ops.aten.add_.Tensor(x, y)
        elif self.way == "packet":
            torch.ops.aten.add_(x, y)
        elif self.way == "numpy":
            return y + torch.from_numpy(y.detach().numpy() * 2)
        elif self.way == "many":
            torch._foreach_add_([x], [y])
        return x


@pytest.mark.parametrize("way", ["function", "overload", "packet", "numpy", "many"])
def test_what_goes_around_the_functions_of_torch_is_computed_for_each_task(way: str) -> None:
    model = model_of(_Around(way), own("second.weight"), own("first.weight"), own())
    with torch.no_grad():
        for _ in range(2):
            found = model.predict_all(X)
            assert all(torch.equal(found[t], model(X, task=t)) for t in model.task_names)


@pytest.mark.parametrize("base", [Residual(), _Around("function")])
def test_gradients_are_those_of_the_tasks_alone(base: nn.Module) -> None:
    names = [name for name, _ in base.named_parameters()]
    model = model_of(base, own(names[-1]), own(names[0]), own(names[-1]))
    outputs = model.predict_all(X)
    for name in model.task_names:
        parameters = list(model.trainable(name).values())
        together = torch.autograd.grad(outputs[name].sum(), parameters, retain_graph=True)
        alone = torch.autograd.grad(model(X, task=name).sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


class _Deciding(nn.Module):
    """Goes on by what a buffer, a value or a shape says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("way", torch.tensor(0.0))
        self.way: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way > 0.5:
            x = self.second(x)
        count = int((self.way * 4).item())
        return x[:, count:] if x.sum() > 0 else x[:, : WIDTH - count]


def test_tasks_that_go_on_differently_run_apart() -> None:
    base = _Deciding()
    model = model_of(base, *(own("first.bias", "way"),) * 5)
    for name, way in zip(model.task_names, (0.0, 1.0, 0.25, 1.0, 0.25), strict=True):
        model.tasks[name].own["way"].fill_(way)
    found = assert_as_alone(model)
    assert {output.shape[1] for output in found.values()} == {WIDTH, WIDTH - 4, WIDTH - 1}


def test_a_second_forward_never_reads_what_the_first_has_written() -> None:
    class Writing(_Deciding):
        def forward(self, x: Tensor) -> Tensor:
            x -= 1.0
            return super().forward(x)

    base = Writing()
    model = model_of(base, own("way"), own("way"))
    model.tasks["t1"].own["way"].fill_(1.0)
    with torch.no_grad(), pytest.raises(DataError, match="writes to its input"):
        model.predict_all(X.clone())
    with torch.inference_mode():
        found = model.predict_all(X.clone())
        alone = {name: model(X.clone(), task=name) for name in model.task_names}
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_attention_embeddings_and_normalisation_differ_by_task() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoder(layer, 2))
    x = torch.randint(10, (3, 5))
    names = [name for name, _ in base.named_parameters()]
    plans = [own(name) for name in names[::3]] + [own(*names)] * 2 + [weft.scale_bias]
    # Alone the layers run as one fused kernel.
    assert_as_alone(model_of(base, *plans, x=x), x, tolerance=1e-5)


def test_plans_with_and_without_adapters_run_by_their_own_structures() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3))
    x = torch.randn(2, 3, 8, 8)
    plans = [lambda b: weft.scale_bias(b, where="layers"), own("2.weight"), weft.full_finetune]
    assert_as_alone(model_of(base, *plans * 2, x=x), x)


def test_structures_of_outputs_are_read_for_each_task() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    base = Two()
    for output in ("b", lambda found: found["a"] + found["b"]):
        model = weft.MultiTaskModel(base, weft.full_finetune(base), example=X, output=output)
        for name in "tu":
            model.add_task(name, weft.Classification(3))
        with torch.no_grad():
            model.tasks["u"].own["b.weight"].add_(1.0)
        assert_as_alone(model.eval())


def test_variants_compute_nothing_by_themselves() -> None:
    variants = Variants.of({frozenset({0}): torch.zeros(2), frozenset({1}): torch.ones(2)})
    with pytest.raises(TasksPartError):
        variants + 1.0
