"""Mixed batches: every row as its task alone, shared work once, and one graph for all mixes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import weft
from core.small import NO_HEAD, conv_net, images, mlp, vectors
from weft.core.kernels import kernel_for
from weft.core.patch import Replace
from weft.core.sharing import Sharing
from weft.errors import DataError, LeaseError, PlanError


def owning(*names: str) -> Callable[[nn.Module], Sharing]:
    """A plan whose tasks own these tensors."""
    return lambda _: Sharing("own", patches={name: Replace() for name in names})


def disturbed(model: weft.MultiTaskModel) -> weft.MultiTaskModel:
    """The model in eval mode with every own tensor moved, differently for each task."""
    with torch.no_grad():
        for name in model.task_names:
            for key, tensor in model.tasks[name].own.items():
                if tensor.is_floating_point():
                    noise = 0.3 * torch.randn_like(tensor)
                    tensor.mul_(noise.exp()) if "var" in key else tensor.add_(noise)
    return model.eval()


def model_of(
    base: nn.Module,
    plan: Callable[[nn.Module], Sharing],
    tasks: int = 3,
    example: Any = None,
    head: bool = False,
) -> weft.MultiTaskModel:
    """A model whose tasks all differ."""
    model = weft.MultiTaskModel(base, plan(base), example=example)
    for i in range(tasks):
        model.add_task(f"t{i}", weft.Classification(4) if head else NO_HEAD)
    return disturbed(model)


def assert_rows_are_their_tasks(model: weft.MultiTaskModel, x: Tensor, rows: list[int]) -> None:
    """Each row of a mixed batch is that of its task alone."""
    mixed = model(x, task=rows)
    for i, task in enumerate(rows):
        alone = model(x[i : i + 1], task=task)[0]
        assert torch.allclose(mixed[i], alone, rtol=1e-4, atol=1e-5), i


def operations(run: Callable[[], object]) -> int:
    """How many operations are dispatched."""

    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Count() as counter:
        run()
    return counter.count


def operations_by_name(run: Callable[[], object]) -> list[str]:
    """The names of the operations that are dispatched."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        run()
    return names


def flops(run: Callable[[], object]) -> int:
    """Multiplications and additions of matrices and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------ shared work


@pytest.mark.parametrize(
    "plan",
    [
        weft.scale_bias,
        weft.bias_only,
        weft.linear_probe,
        lambda b: weft.scale_bias(b, where="layers"),
    ],
    ids=["norm", "bias", "heads", "affine"],
)
@torch.no_grad()
def test_operations_do_not_grow_with_the_number_of_tasks(plan: Any) -> None:
    counts = set()
    for tasks in (2, 8, 32, 128):
        model = model_of(conv_net(), plan, tasks, images(2), head=True)
        x, rows = images(136), torch.arange(136) % tasks
        model(x, task=rows)
        counts.add(operations(lambda m=model, r=rows, x=x: m(x, task=r)))
    assert len(counts) == 1


@torch.no_grad()
def test_layers_that_rows_share_run_once_on_all_of_them() -> None:
    base = conv_net().eval()
    plain = flops(lambda: base(images(6)))
    for plan in (weft.scale_bias, owning("3.weight"), weft.full_finetune):
        model = model_of(base, plan)
        model(images(6), task=[0, 1, 2, 0, 1, 2])
        assert flops(lambda m=model: m(images(6), task=[0, 1, 2, 2, 1, 0])) == plain
    calls = []
    base[0].register_forward_hook(lambda *_: calls.append(1))
    model = model_of(base, owning("3.weight", "4.weight"))
    model(images(6), task=[0, 1, 2, 0, 1, 2])
    calls.clear()
    model(images(6), task=[0, 1, 2, 2, 1, 0])
    assert len(calls) == 1


@torch.no_grad()
def test_tasks_that_own_different_tensors_meet() -> None:
    base = conv_net()
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for i, names in enumerate((["0.weight"], ["3.weight", "3.bias"], [], ["4.weight"])):
        model.add_task(f"t{i}", NO_HEAD, sharing=owning(*names)(base))
    assert_rows_are_their_tasks(disturbed(model), images(7), [3, 2, 1, 0, 1, 2, 3])


@torch.no_grad()
def test_rows_that_share_a_weight_move_together_where_that_is_cheaper() -> None:
    base = nn.Sequential(nn.Linear(4, 2000), nn.Tanh(), nn.Linear(2000, 2000))
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    for i in range(5):  # "t0", "t2" and "t4" share the large weight, the others stand between
        sharing = owning("2.weight")(base) if i % 2 else None
        model.add_task(f"t{i}", NO_HEAD, sharing=sharing)
    disturbed(model)
    x = vectors(10)
    assert_rows_are_their_tasks(model, x, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0])


# ------------------------------------------------------------------------- where rows are


class Turned(nn.Module):
    """Rows in the second axis inside, as in networks that take time first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.norm(x.transpose(0, 1)))[0].mean(0)


class Flat(nn.Module):
    """Places and rows in one axis inside, rows outside or inside of it."""

    def __init__(self, *, rows_outside: bool) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)
        self._outside = rows_outside

    def forward(self, x: Tensor) -> Tensor:
        places = x if self._outside else x.transpose(0, 1)
        y = self.layer(self.norm(places.reshape(-1, 4))).view(places.shape)
        return (y if self._outside else y.transpose(0, 1)).mean(1)


class Reading(nn.Module):
    """A parent that computes with a child's tensor and also calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


class Across(nn.Module):
    """Rows see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(x).mean(0)


class Token(nn.Module):
    """A bare parameter that is put before every row's places."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.token.expand(x.shape[0], -1, -1)
        return (self.norm(torch.cat([tokens, x], 1)) * self.scale).tanh().sum(1)


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (Turned(), ["norm.weight", "norm.bias"]),
        (Turned(), ["lstm.weight_hh_l0"]),
        (Flat(rows_outside=True), ["norm.weight", "layer.bias"]),
        (Flat(rows_outside=True), ["layer.weight"]),
        (Flat(rows_outside=False), ["norm.weight", "layer.bias"]),
        (Flat(rows_outside=False), ["layer.weight"]),
        (Reading(), ["layer.weight"]),
        (Reading(), ["layer.bias"]),
        (Token(), ["token", "norm.weight"]),
        (Token(), ["scale"]),
        (nn.Linear(4, 4), ["weight"]),
    ],
    ids=lambda value: value if isinstance(value, list) else type(value).__name__,
)
@torch.no_grad()
def test_rows_are_found_wherever_they_are(base: nn.Module, names: list[str]) -> None:
    model = model_of(base, owning(*names))
    x = torch.randn(7, 4) if type(base) in (Reading, nn.Linear) else torch.randn(7, 5, 4)
    for rows in ([0, 1, 2, 0, 1, 2, 0], [2, 1, 1, 1, 0, 0, 2]):
        assert_rows_are_their_tasks(model, x, rows)


@torch.no_grad()
def test_rows_that_look_alike_and_rows_that_see_one_another_run_task_by_task() -> None:
    alike = torch.randn(1, 4).expand(4, 4)
    model = model_of(mlp(), weft.full_finetune)
    assert_rows_are_their_tasks(model, alike, [0, 1, 1, 2])
    assert_rows_are_their_tasks(model, vectors(4), [0, 1, 1, 2])
    across = model_of(Across(), owning("layer.weight"))
    x = vectors(4)
    expected = across(x[[0, 2]], task="t0")
    assert torch.allclose(across(x, task=[0, 1, 0, 1])[[0, 2]], expected, atol=1e-6)


# -------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 5)),
        (nn.BatchNorm2d(4, affine=False), (4, 3, 5)),
        (nn.BatchNorm2d(4), (4, 3, 5)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm((3, 4)), (2, 3, 4)),
        (nn.LayerNorm(4, bias=False), (3, 4)),
        (nn.RMSNorm(4), (3, 4)),
        (nn.GroupNorm(2, 4), (4, 5, 3)),
        (nn.GroupNorm(2, 4), (4,)),
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (2, 5, 4)),
        (nn.Linear(4, 3, bias=False), (5, 4)),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("last", [False, True], ids=["first", "channels_last"])
@torch.no_grad()
def test_a_kernel_is_the_layer_for_each_row(layer: nn.Module, shape: Any, last: bool) -> None:
    layer = layer.double().eval()
    tensors = {n: t for n, t in layer.state_dict().items() if t.is_floating_point()}
    own = {n: t + torch.rand(6, *t.shape, dtype=t.dtype) for n, t in tensors.items()}
    x = torch.randn(6, *shape, dtype=torch.float64)
    if last and len(shape) == 3:
        x = x.to(memory_format=torch.channels_last)
    for some in (own, dict(list(own.items())[:1])):
        kernel = kernel_for(layer, frozenset(some))
        assert kernel is not None
        found = kernel(layer, some, x)
        for row in range(6):
            mine = {n: some[n][row] if n in some else t for n, t in tensors.items()}
            alone = torch.func.functional_call(layer, mine, (x[row : row + 1],))
            assert torch.allclose(found[row], alone[0], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(t, layer.state_dict()[n]) for n, t in tensors.items())


@torch.no_grad()
def test_heads_of_one_form_run_together_and_others_apart() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.layer, self.factor = nn.Linear(5, 2), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.layer(x)

    base = mlp()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=vectors(2)).eval()
    for i in range(4):
        model.add_task(f"t{i}", weft.Task(Scaled(1.0 + i // 2), NO_HEAD.loss))
    model.add_task("none", NO_HEAD)
    model.add_task("number", weft.Regression())
    model.eval()
    rows = [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    x = vectors(10)
    mixed = model(x, task=rows)
    for i, task in enumerate(rows):
        assert torch.allclose(mixed[i], model(x[i : i + 1], task=task)[0], atol=1e-6)


# ------------------------------------------------------------------------------ gradients


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())
        self.two = nn.Sequential(nn.Linear(6, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.one, x, use_reentrant=False)
        return checkpoint(self.two, y, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [conv_net, Checkpointed], ids=["plain", "checkpointed"])
def test_gradients_of_a_mixed_batch_are_those_of_its_tasks(make: Callable[[], nn.Module]) -> None:
    model = model_of(make(), weft.full_finetune).double()
    x = (images(6) if make is conv_net else vectors(6)).double()
    rows = torch.tensor([0, 1, 2, 2, 1, 0])
    parameters = [p for t in model.task_names for p in model.task_parameters(t)]
    mixed = torch.autograd.grad(model(x, task=rows).sin().sum(), parameters)
    losses = [model(x[rows == i], task=i).sin().sum() for i in range(3)]
    apart = torch.autograd.grad(sum(losses), parameters)  # type: ignore[arg-type]
    for one, other in zip(mixed, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_two_mixed_batches_before_one_backward() -> None:
    model = model_of(Checkpointed(), weft.full_finetune).double()
    x, y = vectors(4).double(), vectors(4).double()
    parameters = [p for t in model.task_names for p in model.task_parameters(t)]

    def both() -> Tensor:
        total: Tensor = model(x, task=[0, 1, 0, 1]).sin().sum()
        return total + model(y, task=[2, 1, 2, 1]).cos().sum()

    together = torch.autograd.grad(both(), parameters)
    one = torch.autograd.grad(
        model(x, task=[0, 1, 0, 1]).sin().sum(), parameters, allow_unused=True
    )
    two = torch.autograd.grad(
        model(y, task=[2, 1, 2, 1]).cos().sum(), parameters, allow_unused=True
    )
    for whole, first, second in zip(together, one, two, strict=True):
        parts = [g for g in (first, second) if g is not None]
        assert torch.allclose(whole, sum(parts), rtol=1e-8, atol=1e-10)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- training


class CheckpointedNorm(nn.Module):
    """Batch normalisation that is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]


TRAINED: dict[str, Callable[[nn.Module], Sharing]] = {
    "everything": weft.full_finetune,
    "norms": weft.scale_bias,
    "one layer, frozen statistics": owning("3.weight"),
    "shared, private norms": lambda base: weft.hard_sharing(base, own="nothing"),
    "shared, shared norms": lambda b: weft.hard_sharing(b, own="nothing", batchnorm="follow"),
    "gates": weft.taps,
}


def trained_step(
    make: Callable[[], nn.Module], plan: Callable[[nn.Module], Sharing], *, mixed: bool
) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients and tensors after one forward and backward in training mode."""
    torch.manual_seed(3)
    base = make()
    model = weft.MultiTaskModel(base, plan(base))
    for name in "abc":
        model.add_task(name, NO_HEAD)
    model.double().train()
    x, rows = images(8).double(), torch.tensor([0, 1, 2, 2, 1, 0, 1, 2])
    if mixed:
        output = model(x, task=rows)
    else:
        output = torch.empty(8, 6, dtype=torch.float64)
        for i in range(3):
            output[rows == i] = model(x[rows == i], task=i)
    output.sin().sum().backward()
    parameters = [*model.shared_trainable().values()]
    parameters += [p for t in model.task_names for p in model.trainable(t).values()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return output.detach(), [p.grad for p in parameters], state


@pytest.mark.parametrize("plan", TRAINED)
@pytest.mark.parametrize("make", [conv_net, CheckpointedNorm], ids=["plain", "checkpointed"])
def test_a_mixed_batch_trains_like_its_tasks(plan: str, make: Callable[[], nn.Module]) -> None:
    if make is CheckpointedNorm and "layer" in plan:
        pytest.skip("names another module")
    found, expected = (trained_step(make, TRAINED[plan], mixed=mixed) for mixed in (True, False))
    assert torch.allclose(found[0], expected[0], rtol=1e-8, atol=1e-10)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-7, atol=1e-9)  # type: ignore[arg-type]
    for name, tensor in expected[2].items():
        assert torch.allclose(found[2][name].double(), tensor.double(), rtol=1e-8), name


def test_shared_layers_train_once_for_all_rows() -> None:
    model = model_of(conv_net(), weft.scale_bias).train()
    model(images(6), task=[0, 1, 2, 0, 1, 2])
    one = flops(lambda: model(images(6), task=[0, 1, 2, 0, 1, 2]))
    assert one == flops(lambda: model(images(6), task="t0"))
    norms = operations_by_name(lambda: model(images(6), task=[0, 1, 2, 0, 1, 2]))
    assert norms.count("native_batch_norm") == 6  # two layers, three tasks
    assert norms.count("convolution") == 2


def test_a_group_that_is_too_small_changes_nothing() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    for name in "ab":
        model.add_task(name, NO_HEAD)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match="group of one row is too small"):
        model(vectors(4), task=["a", "a", "a", "b"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------- threads and memory


def test_threads_mix_at_the_same_time() -> None:
    model = model_of(conv_net(), weft.full_finetune, 5)
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(15):
                x = torch.randn(6, 3, 8, 8, generator=generator)
                rows = torch.randint(0, 5, (6,), generator=generator)
                mixed = model(x, task=rows)
                alone = torch.stack([model(x[i : i + 1], task=int(rows[i]))[0] for i in range(6)])
                if not torch.allclose(mixed, alone, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_task_that_leaves_after_a_mixed_batch_frees_its_memory() -> None:
    model = model_of(conv_net(), weft.full_finetune, 3, images(2), head=True)
    model(images(4), task=[0, 1, 2, 0])
    own = [weakref.ref(t) for t in model.tasks["t1"].own.values()]
    own += [weakref.ref(p) for p in model.tasks["t1"].parameters()]
    model.remove_task("t1")
    gc.collect()
    assert not [reference for reference in own if reference() is not None]


# -------------------------------------------------------------------- one graph for all mixes


@pytest.mark.parametrize("plan", [weft.scale_bias, weft.bias_only, weft.linear_probe])
@torch.no_grad()
def test_a_view_of_several_tasks_has_one_graph(plan: Any) -> None:
    model = model_of(conv_net(), plan, 4, images(1), head=True)
    view = model.mixed_view(["t3", "t1", "t2"])
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(view, fullgraph=True, backend=backend)
    x = images(6)
    for rows in ([0, 1, 2, 0, 1, 2], [2, 2, 2, 2, 2, 2], [1, 0, 1, 0, 1, 0]):
        names = [view.task_names[i] for i in rows]
        expected = model(x, task=names)
        assert torch.allclose(view(x, task=torch.tensor(rows)), expected, atol=1e-5)
        assert torch.allclose(compiled(x, task=torch.tensor(rows)), expected, atol=1e-5)
    assert len(graphs) == 1


def test_a_view_of_several_tasks_says_what_depends_on_the_mix() -> None:
    model = model_of(conv_net(), owning("3.weight"), 2, images(1), head=True)
    with pytest.raises(PlanError, match=r"'3' runs task by task.*'3\.weight' differs"):
        model.mixed_view()
    model = model_of(conv_net(), weft.linear_probe, 2, images(1), head=True)
    model.add_task("number", weft.Regression())
    with pytest.raises(PlanError, match="heads of 't0' and 'number' differ in form"):
        model.eval().mixed_view()
    with pytest.raises(PlanError, match="eval mode"):
        model.train().mixed_view()
    view = model.eval().mixed_view(["t0", "t1"])
    with pytest.raises(LeaseError, match="eval mode"):
        view.train()
