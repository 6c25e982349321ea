"""TAPS under fit: free gates, priced gates, final gates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from training_nets import assert_same_bits, conv_net, images, in_order, model_of, shuffled

import weft
from weft.core.model import MultiTaskModel
from weft.core.sharing import Phase
from weft.training import Epoch


def _scores(model: MultiTaskModel, task: str = "a") -> list[float]:
    own = model.tasks[task].own
    return [float(own[key].detach()) for key in own if key.endswith(":score")]


def test_gates_are_free_in_the_warm_up_priced_then_and_fixed_at_the_end() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base, warmup=2, harden=0.5, penalty=5.0))
    scores: list[list[float]] = []
    outputs: list[Tensor] = []
    x = torch.randn(4, 3, 6, 6)

    def look(epoch: Epoch) -> None:
        scores.append(_scores(epoch.model))
        modes = epoch.model.training
        epoch.model.eval()
        outputs.append(epoch.model(x, task="a").detach().clone())
        epoch.model.train(modes)

    history = weft.fit(
        model,
        {"a": (shuffled(images(32, 3, 1)), in_order(images(16, 3, 2)))},
        epochs=6,
        lr=0.02,
        keep="last",
        callbacks=[look],
        progress=False,
    )
    rows = history["a"]
    assert [r["phase"] for r in rows] == ["warm-up"] * 2 + ["select"] * 2 + ["harden"] * 2
    assert [r["penalty"] > 0 for r in rows] == [False, False, True, True, False, False]
    assert scores[1] != scores[2] != scores[3]
    assert scores[3] == scores[4] == scores[5]
    model.eval()
    assert torch.equal(model(x, task="a"), outputs[-1])  # hardening does not change outputs
    ledger = model.ledger("a")
    assert ledger.open_gates == (rows[-1]["open_gates"], rows[-1]["gates"])
    assert not any(key.endswith(":score") for key in model.tasks["a"].own)


def test_hardened_outputs_are_those_of_the_open_and_closed_gates() -> None:
    base = conv_net().double()
    plan = weft.taps(base, warmup=1, harden=0.4, penalty=0.05)
    model = model_of(base, plan, tasks=["a"])
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    seen: list[Tensor] = []

    def look(_: Epoch) -> None:
        model.eval()
        seen.append(model(x, task="a").detach().clone())

    weft.fit(
        model,
        {"a": in_order(images(32, 3, 1, torch.float64))},
        epochs=6,
        lr=0.01,
        weight_decay=0.1,
        clip=1.0,
        warmup_steps=4,
        optimizer="adamw",
        callbacks=[look],
        progress=False,
    )
    opened, gates = model.ledger("a").open_gates
    assert 0 < opened < gates
    model.eval()
    assert torch.equal(model(x, task="a"), seen[-1])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scores_are_not_decayed(optimizer: str) -> None:
    """Without a penalty and with tensors that do not move, nothing moves a score."""
    base = conv_net()
    plan = weft.taps(base, penalty=0.0, warmup=0, harden=0.0)
    phase = Phase("frozen", freeze=("*:tuned",))
    model = model_of(base, replace(plan, phases=(phase,)))
    seen: list[list[float]] = []
    own: list[dict[str, Tensor]] = []
    before = {k: t.detach().clone() for k, t in model.tasks["a"].own.items() if "tuned" in k}

    def look(epoch: Epoch) -> None:
        seen.append(_scores(epoch.model))
        own.append({k: t.detach().clone() for k, t in model.tasks["a"].own.items() if "tuned" in k})

    start = _scores(model)
    weft.fit(
        model,
        {"a": in_order(images(32, 3, 1))},
        epochs=2,
        weight_decay=0.5,
        optimizer=optimizer,  # type: ignore[arg-type]
        callbacks=[look],
        progress=False,
    )
    assert seen[-1] == start
    assert_same_bits(own[-1], before)  # frozen tensors feel no decay either


def test_the_epoch_that_is_kept_is_one_with_final_gates() -> None:
    base = conv_net()
    model = model_of(base, weft.taps(base, warmup=1, harden=0.5, penalty=1.0))
    data = {"a": (shuffled(images(32, 3, 1)), in_order(images(16, 3, 2)))}
    history = weft.fit(model, data, epochs=7, lr=0.05, progress=False)
    assert history["a"][history.best["a"]]["phase"] == "harden"
