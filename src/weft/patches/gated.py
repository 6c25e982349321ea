"""Gated patches: a task owns a tensor only while its gate's score is over a threshold.

The forward uses the hard gate, g = 1 if s >= tau else 0. The backward passes the gate's gradient
unchanged to the score (straight-through), also when the gate is closed, so that it can open again:

    dL/ds = <dL/dE, D>        with the effective weight E = W + g D
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.patch import Patch, Replace

SMALL = 1 << 14
"""Elements up to which a tensor stays in a core's cache and the difference costs nothing."""


@dataclass(frozen=True)
class _Gated(Patch, ABC):
    """What both forms share.

    Args:
        score: key of the gate's score; patches of one layer name the same key.
        initial: where scores start.
        threshold: scores at or over it are open.
        price: key of a buffer with the price of the task's scores, for charges that move it.
        initial_price: where it starts.
    """

    score: str
    initial: float = 0.15
    threshold: float = 0.1
    price: str | None = None
    initial_price: float = 0.0

    def _is_open(self, tensors: Mapping[str, Tensor]) -> bool:
        return bool(tensors[self.score] >= self.threshold)

    def _gate_keys(self) -> tuple[str, ...]:
        return (self.score,) if self.price is None else (self.score, self.price)

    def _new_gate(self, base: Tensor) -> dict[str, Tensor]:
        gate: dict[str, Tensor] = {self.score: nn.Parameter(base.new_full((), self.initial))}
        if self.price is not None:
            gate[self.price] = base.new_full((), self.initial_price)
        return gate

    @abstractmethod
    def effective(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor that an open gate uses."""

    def harden(
        self, name: str, base: Tensor, tensors: Mapping[str, Tensor]
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        if not self._is_open(tensors):
            return None, {}
        # Training on, weight decay still concerns the difference to the base.
        tuned = nn.Parameter(self.effective(name, base, tensors).detach())
        return Replace(anchor=True), {name: tuned}

    def gate_score(self, tensors: Mapping[str, Tensor]) -> float | None:
        return float(tensors[self.score].detach())


@dataclass(frozen=True)
class GatedTuned(_Gated):
    """The gate chooses between the base tensor and the task's tuned one; nothing is summed.

    Right only over a frozen base: E = W + g D with D = tuned - W. Weight decay on the tuned tensor
    must pull towards the base, which `weft.fit` does.
    """

    needs_frozen_base = True

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}:tuned", *self._gate_keys())

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        tuned = nn.Parameter(base.detach().clone())
        return {f"{name}:tuned": tuned, **self._new_gate(base)}

    def anchored(self, name: str) -> tuple[str, ...]:
        return (f"{name}:tuned",)

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        tuned, score = tensors[f"{name}:tuned"], tensors[self.score]
        chosen: Tensor = _ChooseTuned.apply(base, tuned, score, self.threshold)  # type: ignore[no-untyped-call]
        return chosen

    def effective(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return tensors[f"{name}:tuned"]


@dataclass(frozen=True)
class GatedResidual(_Gated):
    """The gate adds the task's residual to the base tensor, which may train as well."""

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}:residual", *self._gate_keys())

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        residual = nn.Parameter(torch.zeros_like(base.detach()))
        return {f"{name}:residual": residual, **self._new_gate(base)}

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        residual, score = tensors[f"{name}:residual"], tensors[self.score]
        summed: Tensor = _AddResidual.apply(base, residual, score, self.threshold)  # type: ignore[no-untyped-call]
        return summed

    def effective(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return base + tensors[f"{name}:residual"]


class _ChooseTuned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, tuned: Tensor, score: Tensor, threshold: float) -> Tensor:
        ctx.open = bool(score >= threshold)
        ctx.save_for_backward(base, tuned)
        return (tuned if ctx.open else base).view_as(base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, tuned = ctx.saved_tensors
        _, needs_tuned, needs_score, _ = ctx.needs_input_grad
        # A closed gate gives zeros, not None: momentum then runs out instead of being frozen.
        own = (grad if ctx.open else torch.zeros_like(grad)) if needs_tuned else None
        return None, own, _dot_difference(grad, tuned, base) if needs_score else None, None


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, residual: Tensor, score: Tensor, threshold: float
    ) -> Tensor:
        ctx.open = bool(score >= threshold)
        ctx.save_for_backward(residual)
        return base + residual if ctx.open else base.view_as(base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        needs_base, needs_residual, needs_score, _ = ctx.needs_input_grad
        own = (grad if ctx.open else torch.zeros_like(grad)) if needs_residual else None
        score = (grad * residual).sum() if needs_score else None
        return grad if needs_base else None, own, score, None


def _dot_difference(grad: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
    """<grad, tuned - base> as two dot products, for large tensors without a pass of its own.

    This rounds relative to |tuned| instead of |tuned - base|: an error of about
    1e-7 |grad| |tuned|, far below any penalty's gradient, and zero while the two are equal.
    """
    exact = torch.is_grad_enabled() or grad.device.type != "cpu" or grad.numel() <= SMALL
    if exact or grad.dtype not in (torch.float32, torch.float64):
        return (grad * (tuned - base)).sum()
    g, t, b = _in_order_of_memory(grad, tuned, base)
    return torch.dot(g, t) - torch.dot(g, b)


def _in_order_of_memory(grad: Tensor, tuned: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """The tensors as vectors in one order of elements; no copy if they are laid out alike."""
    if tuned.dim() == 4 and tuned.is_contiguous(memory_format=torch.channels_last):
        grad, tuned, base = (x.permute(0, 2, 3, 1) for x in (grad, tuned, base))
    return grad.reshape(-1), tuned.reshape(-1), base.reshape(-1)
