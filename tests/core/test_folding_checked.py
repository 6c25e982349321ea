"""A folded network computes what the task computes, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.errors import PlanError

SITES = ["embedding", "layer"]


class Tied(nn.Module):
    """A network that uses the weight of its embedding for its output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.layer(self.embedding(tokens).mean(1)), self.embedding.weight)


def drawn(model: weft.MultiTaskModel) -> weft.MultiTaskModel:
    """Let the task 'a' own numbers that are not zero."""
    model.add_task("a", weft.Classification(3))
    with torch.no_grad():
        for tensor in model.task_parameters("a"):
            tensor.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("example", [torch.randint(0, 11, (6, 5)), torch.zeros(2, 5).long()])
def test_weights_that_are_read_beside_a_call_are_not_folded_wrongly(example: Tensor) -> None:
    base = Tied()
    model = drawn(weft.MultiTaskModel(base, weft.lora(base, r=2, target=SITES), example=example))
    with pytest.raises(PlanError, match="computes something else than the task"):
        model.fold("a")
    with pytest.raises(PlanError, match="'a' cannot be merged: The folded network computes"):
        weft.merge(model, "a")
    plan = weft.lora(base, r=2, target=["layer"])
    other = drawn(weft.MultiTaskModel(base, plan, example=example))
    plain = other.fold("a").eval()
    torch.testing.assert_close(other.head("a")(plain(example)), other(example, task="a"))


@pytest.mark.parametrize("zeros", [True, False])
def test_hooks_on_adapted_layers_are_seen(zeros: bool) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    base[0].register_forward_hook(lambda _module, _inputs, output: output * 3)
    x = torch.zeros(4, 8) if zeros else torch.randn(4, 8)
    model = drawn(weft.MultiTaskModel(base, weft.lora(base, r=2), example=x))
    with pytest.raises(PlanError, match="a hook changes what it gives"):
        model.fold("a")


class Counting(nn.Module):
    """A network that counts its forwards, draws numbers if asked to, and rounds inside."""

    def __init__(self, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=dtype)
        self.noise, self.calls = noise, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        y = self.layer(x.to(self.layer.weight.dtype)).float()
        return y + self.noise * torch.randn_like(y) if self.noise else y


def test_the_check_leaves_the_folded_network_as_it_is() -> None:
    base = Counting()
    model = drawn(weft.MultiTaskModel(base, weft.lora(base), example=torch.randn(64, 8)))
    plain = model.fold("a")
    assert (plain.calls, float(plain.seen)) == (0, 0.0)


@pytest.mark.parametrize(("noise", "dtype"), [(1.0, torch.float32), (0.0, torch.bfloat16)])
def test_what_draws_numbers_or_rounds_inside_can_be_folded(
    noise: float, dtype: torch.dtype
) -> None:
    base = Counting(noise, dtype)
    model = drawn(weft.MultiTaskModel(base, weft.lora(base), example=torch.randn(4, 8)))
    model.fold("a")
    with torch.autocast("cpu", torch.bfloat16):
        model.fold("a")


def test_the_check_draws_no_numbers_and_leaves_the_mode() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8))
    model = drawn(weft.MultiTaskModel(base, weft.lora(base), example=torch.zeros(1, 8)))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plain = model.train().fold("a")
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in plain.modules())
    assert all(module.training for module in model.base.modules()) == base.training
