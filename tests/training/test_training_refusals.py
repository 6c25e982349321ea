"""What cannot train is refused or stopped, by name, and leaves the model whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from training_nets import (
    assert_same_bits,
    conv_net,
    dense_net,
    everything,
    images,
    in_order,
    model_of,
    shuffled,
    vectors,
)

import weft
from weft.errors import ConfigError, DataError, PlanError, TaskError, TrainingError


def _model(plan: Callable[..., Any] = weft.full_finetune) -> weft.MultiTaskModel:
    base = dense_net()
    return model_of(base, plan(base))


BATCHES = in_order(vectors(16, 3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is a whole number of at least 1, found 0"),
        ({"epochs": 2.5}, "epochs is a whole number"),
        ({"epochs": "3"}, "epochs is a whole number .* found '3'"),
        ({"epochs": True}, "epochs is a whole number"),
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"accumulate": 0}, "accumulate is a whole number"),
        ({"warmup_steps": -1}, "warmup_steps is a whole number of at least 0"),
        ({"patience": 0}, "patience is a whole number of at least 1"),
        ({"seed": -1}, "seed is a whole number"),
        ({"lr": 0.0}, "lr is a positive number, found 0.0"),
        ({"lr": float("nan")}, "lr is a positive number"),
        ({"lr": "0.1"}, "lr is a positive number, found '0.1'"),
        ({"head_lr": -1.0}, "head_lr is a positive number"),
        ({"clip": float("inf")}, "clip is a positive number"),
        ({"momentum": 1.0}, r"momentum is a number in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay is a number >= 0"),
        ({"keep": "first"}, "keep is 'best' or 'last', found 'first'"),
        ({"schedule": "linear"}, "schedule is 'cosine' or 'constant'"),
        ({"optimizer": "adam"}, "optimizer is 'sgd', 'adamw' .* Close matches: adamw"),
        ({"optimizer": lambda _: None}, "returns a torch.optim.Optimizer, found NoneType"),
        ({"weights": {"aa": 1.0}}, "weights names 'aa', .* Close matches: a"),
        ({"weights": {"b": 1.0}}, "weights names 'b', which is not fitted"),
        ({"weights": {"a": -1.0}}, r"weights\['a'\] is a number >= 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    model = _model()
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        weft.fit(model, {"a": BATCHES}, **{"epochs": 1, "progress": False, **options})
    assert_same_bits(everything(model), before)


def test_numpy_numbers_are_numbers() -> None:
    import numpy as np

    weft.fit(
        _model(),
        {"a": BATCHES},
        epochs=np.int64(1),  # type: ignore[arg-type]
        lr=np.float32(0.1),  # type: ignore[arg-type]
        progress=False,
    )


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ConfigError, "data for at least one task"),
        ({"aa": BATCHES}, TaskError, "There is no task 'aa'.*Close matches: a"),
        ({"a": BATCHES, "aa": BATCHES}, TaskError, "There is no task 'aa'"),
        ({"a": []}, DataError, "The data of 'a' is empty"),
        ({"a": (BATCHES, [])}, DataError, "The data of 'a' is empty"),
        ({"a": (BATCHES, BATCHES, BATCHES)}, DataError, "found a tuple of 3"),
        ({"a": iter(BATCHES)}, DataError, "an iterator, which can be read only once"),
        ({"a": (BATCHES, iter(BATCHES))}, DataError, "an iterator, which can be read only once"),
        ({"a": 3}, DataError, "is batches, for instance a DataLoader; found int"),
        (
            {"a": DataLoader(vectors(4, 3, 1), batch_size=8, drop_last=True)},
            DataError,
            "The data of 'a' is empty.*drop_last",
        ),
        ({"a": [[torch.zeros(2, 5)]]}, DataError, "A batch of 'a' is a pair .* found list of 1"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    data: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = _model()
    before = everything(model)
    with pytest.raises(error, match=message):
        weft.fit(model, data, epochs=1, progress=False)
    assert_same_bits(everything(model), before)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = vectors(self.rows, 3, 1).tensors
        return zip(x, y, strict=True)


def test_data_without_a_length_needs_steps() -> None:
    stream = DataLoader(Stream(20), batch_size=8)
    with pytest.raises(DataError, match=r"'a' has no length. .* fit\(\.\.\., steps=100\)"):
        weft.fit(_model(), {"a": stream}, epochs=1, progress=False)
    history = weft.fit(_model(), {"a": (stream, stream)}, epochs=2, steps=7, progress=False)
    assert history.epochs == 2
    with pytest.raises(DataError, match="The training data of 'a' gave no batch"):
        weft.fit(_model(), {"a": DataLoader(Stream(0))}, epochs=1, steps=7, progress=False)


def test_steps_cut_epochs() -> None:
    model, whole = _model(), _model()
    weft.fit(model, {"a": BATCHES}, epochs=1, steps=1, progress=False)
    weft.fit(whole, {"a": BATCHES[:1]}, epochs=1, progress=False)
    assert_same_bits(everything(model), everything(whole))


# ------------------------------------------------------------------------ numbers that are not


def test_inputs_that_are_not_numbers_stop_the_run_and_leave_statistics_whole() -> None:
    base = conv_net()
    model = model_of(base, weft.full_finetune(base))
    states = []
    data = images(32, 3, 1)

    def spoil(epoch: Any) -> None:
        states.append(everything(epoch.model))
        if epoch.number == 1:
            data.tensors[0][20] = torch.nan

    with pytest.raises(TrainingError, match="inputs of 'a' at step 10 contain NaN"):
        weft.fit(
            model, {"a": DataLoader(data, 8)}, epochs=4, lr=0.05, callbacks=[spoil], progress=False
        )
    assert len(states) == 2
    assert_same_bits(everything(model), states[-1])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        factor = torch.inf if calls[0] == 4 else 1.0
        return nn.functional.cross_entropy(output, target) * factor

    model.add_task("good", weft.Task(nn.Linear(8, 3), nn.functional.cross_entropy))
    model.add_task("bad", weft.Task(nn.Linear(8, 3), loss))
    before = everything(model)
    match = r"The loss of 'bad' at step 3 is inf\. Try a lower learning rate, gradient clipping"
    batches = in_order(vectors(40, 3, 1))
    with pytest.raises(TrainingError, match=match):
        weft.fit(model, {"good": batches, "bad": batches}, epochs=1, progress=False)
    assert_same_bits(everything(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_learning_rate_that_is_far_too_high_stops_the_run() -> None:
    model = _model()
    before = everything(model)
    with pytest.raises(TrainingError, match=r"(loss of 'a'|Parameters are).*lower"):
        weft.fit(model, {"a": BATCHES}, epochs=5, lr=1e38, schedule="constant", progress=False)
    assert_same_bits(everything(model), before)


def test_parameters_that_break_in_the_last_step_are_noticed() -> None:
    model = _model()
    before = everything(model)
    with pytest.raises(TrainingError, match="Parameters are NaN or infinite after epoch 1"):
        weft.fit(
            model,
            {"a": [[torch.full((4, 5), 1e20), BATCHES[0][1][:4]]]},
            epochs=1,
            lr=1e30,
            weights={"a": 1e30},
            progress=False,
        )
    assert_same_bits(everything(model), before)


def test_a_loss_of_several_numbers_is_refused() -> None:
    base = dense_net()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    loss = nn.CrossEntropyLoss(reduction="none")
    model.add_task("a", weft.Task(nn.Linear(8, 3), loss))
    with pytest.raises(TaskError, match=r"loss of 'a' is one number, found shape \(8,\)"):
        weft.fit(model, {"a": BATCHES}, epochs=1, progress=False)


def test_a_last_batch_of_one_row_is_refused_before_statistics_move() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()
    )
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(2, 5))
    model.add_task("a", weft.Classification(3))
    before = everything(model)
    with pytest.raises(DataError, match="A group of one row is too small"):
        weft.fit(model, {"a": DataLoader(vectors(9, 3, 1), 8)}, epochs=1, progress=False)
    assert_same_bits(everything(model), before)


def test_a_plan_that_trains_nothing_is_refused() -> None:
    base = nn.Sequential(nn.Linear(5, 3))
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(None, nn.functional.cross_entropy))
    model.add_task("b", weft.Classification(2, head_trains=False))
    for name in "ab":
        with pytest.raises(PlanError, match=f"Nothing trains for {name}.*no parameters that train"):
            weft.fit(model, {name: BATCHES}, epochs=1, progress=False)


# ------------------------------------------------------------------------------- other ways


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """One process has one precision; a test of another one begins and ends without any."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_trains_and_leaves_full_precision_behind() -> None:
    model, full = _model(weft.taps), _model(weft.taps)
    data = {"a": (shuffled(vectors(64, 3, 1)), in_order(vectors(32, 3, 2)))}
    mixed = weft.fit(model, data, epochs=6, lr=0.1, precision="bf16", progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = weft.fit(full, data, epochs=6, lr=0.1, progress=False)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert mixed["a"][-1]["loss"] == pytest.approx(plain["a"][-1]["loss"], abs=0.05)
    assert mixed["a"][-1]["loss"] != plain["a"][-1]["loss"]


def test_workers_and_their_augmentation_repeat_with_the_seed() -> None:
    class Noisy(torch.utils.data.TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return x + torch.randn_like(x), y

    results = []
    for draws in (0, 5):
        torch.rand(draws)
        model = _model()
        loader = DataLoader(Noisy(*vectors(16, 3, 1).tensors), 8, shuffle=True, num_workers=1)
        weft.fit(model, {"a": loader}, epochs=2, progress=False)
        results.append(everything(model))
    assert_same_bits(*results)


def test_dicts_with_labels_train() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 8)

        def forward(self, values: Tensor) -> Tensor:
            output: Tensor = self.linear(values)
            return output

    torch.manual_seed(0)
    base = Named()
    batches = [{"values": x, "labels": y} for x, y in BATCHES]
    models = []
    for given in (batches, BATCHES):
        model = weft.MultiTaskModel(base, weft.full_finetune(base))
        model.add_task("a", weft.Classification(3))
        weft.fit(model, {"a": given}, epochs=2, progress=False)  # type: ignore[dict-item]
        models.append(everything(model))
    assert_same_bits(*models)


def test_a_base_that_bypasses_its_modules_is_refused_instead_of_not_trained() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.run = lambda x: self.linear(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    base = Hidden()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, 4))
    model.add_task("a", weft.Classification(2))
    batches = [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(TrainingError, match=r"'linear\.weight'.*through its modules"):
        weft.fit(model, {"a": batches}, epochs=1, progress=False)
