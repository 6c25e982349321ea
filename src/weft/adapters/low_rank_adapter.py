"""What low-rank adapters of all layers have in common: y + scale * B(A(x))."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.adapter import Call, RowwiseAdapter
from weft.errors import PlanError

Start = Literal["kaiming", "gaussian"]
"""How A starts: uniform within 1/sqrt(inputs), or normal with a deviation of 1/r."""


@dataclass(frozen=True)
class Branch:
    """What a low-rank branch is like, whatever layer it stands at.

    Args:
        r: the rank.
        scale: factor on the branch.
        dropout: probability with which an input of the branch is dropped in training.
        start: how A starts.
        common: whether a second branch, of tensors that all tasks share, runs beside it.
    """

    r: int
    scale: float
    dropout: float
    start: Start
    common: bool = False

    def reducing(self, shape: tuple[int, ...], inputs: int, like: Tensor) -> Tensor:
        """A at its random start.

        Args:
            shape: of A.
            inputs: how many numbers one number of A's result is made of.
            like: a tensor of the type and device that A shall have.
        """
        bound = 1.0 / math.sqrt(inputs)
        # Drawn on the CPU, so that a seed means the same everywhere.
        a = torch.empty(shape)
        a = a.uniform_(-bound, bound) if self.start == "kaiming" else a.normal_(std=1.0 / self.r)
        return a.to(like.device, like.dtype)


COMMON = ("common_A", "common_B")
"""Names of the factors of the branch that all tasks share."""


class LowRankAdapter(RowwiseAdapter, ABC):
    """Adds a low-rank branch of the task to what its site gives, and one of all tasks on demand.

    Args:
        a: the start of A, which reduces the input to the rank.
        b: the start of B, which leads from there to the output.
        branch: what it is like.
    """

    def __init__(self, a: Tensor, b: Tensor, branch: Branch) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.common = branch.common
        if branch.common:
            self.common_A, self.common_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale = branch.scale
        self.dropout = branch.dropout

    def shared_names(self) -> frozenset[str]:
        """The factors of the branch of all tasks; the task owns the others."""
        return frozenset(COMMON if self.common else ())

    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:  # noqa: ARG002
        """The site's output, and the branch on the site's first input added to it."""
        x = self._input(site, args)
        y = self._with_common(inner(*args), x)
        return self.added(y, x, self.A.to(y.dtype), self.B.to(y.dtype))

    def _with_common(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.common:
            return y
        return self.added(y, x, self.common_A.to(y.dtype), self.common_B.to(y.dtype))

    def forward_rows(
        self,
        own: Mapping[str, Tensor],
        call: Call,  # noqa: ARG002
        site: str,
        inner: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """The same with factors (rows, *shape), for each row those of its task."""
        x = self._input(site, args)
        y = self._with_common(inner(*args), x)

        def each(name: str, shared: Tensor | None) -> Tensor:
            if shared is not None:
                return shared.to(y.dtype).expand(x.shape[0], *shared.shape)
            return own[name].to(y.dtype)

        a = each("A", None if "A" in own else self.A)
        b = each("B", None if "B" in own else self.B)
        return self.added_rows(y, x, a, b)

    def _input(self, site: str, args: tuple[Any, ...]) -> Tensor:
        if not args:
            raise PlanError(
                f"The layer '{site}' is called with keywords only, so its low-rank adapter does "
                "not see its input. Leave it out: exclude=[...]."
            )
        x: Tensor = args[0]
        if self.dropout and self.training:
            return F.dropout(x, self.dropout)
        return x

    @abstractmethod
    def added(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """y + scale * B(A(x)).

        Args:
            y: what the site gives.
            x: its input.
            a: the factor A.
            b: the factor B.
        """

    @abstractmethod
    def added_rows(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The same for factors of each row, (rows, *shape), and x and y with rows first."""

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A in the shape of the site's weight."""

    def fold(self, site: nn.Module) -> nn.Module:
        """A copy of the layer with the weight W + scale * B A; its bias stays."""
        layer: Any = copy.deepcopy(site)
        with torch.no_grad():
            weight = layer.weight
            exact = torch.promote_types(weight.dtype, torch.float32)
            added = self.product(self.A.to(exact), self.B.to(exact))
            if self.common:
                added = added + self.product(self.common_A.to(exact), self.common_B.to(exact))
            layer.weight = nn.Parameter((weight.to(exact) + self.scale * added).to(weight.dtype))
        return layer  # type: ignore[no-any-return]
