"""Patience counts epochs without a better score; a tie is no better score."""

from __future__ import annotations

import torch

from weft.training.selection import Selection


def test_a_plateau_ends_the_run_and_keeps_its_last_epoch() -> None:
    selection = Selection(("a",), joint=False, patience=2)
    for epoch, score in enumerate([0.5, 0.6, 0.6, 0.6]):
        state = {"task:a": {"w": torch.tensor(epoch)}}
        selection.consider(epoch, {"a": score}, state)
        assert selection.hopeless(epoch) is (epoch == 3)
    assert selection.epochs == {"a": 3}
