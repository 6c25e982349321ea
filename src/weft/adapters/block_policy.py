"""A residual block that a task executes or skips, by a policy that it learns."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from weft.core.adapter import Adapter, Call, InlineAdapter, Insertion
from weft.errors import PlanError

Draw = Literal["likely", "sample"]
"""How a choice is made: the likelier way, or at random by its probability."""


@final
@dataclass(frozen=True)
class BlockPolicy(Insertion):
    """Inserts a task's choice between executing a residual block and skipping it.

    While the choice is learned (temperature > 0), training mixes both, ``u f + (1 - u) r`` with a
    soft Gumbel sample u; else one of both is computed, and the other is not.

    Source: Sun, Panda, Feris, Saenko, AdaShare, NeurIPS 2020.

    Args:
        shortcut: the block's child that goes around its branch, or "" for its input; a child needs
            `KeptOutput` at its site.
        evaluation: how the block is chosen in eval mode while the choice is learned.
    """

    shortcut: str = ""
    evaluation: Draw = "likely"

    def build(self, site: nn.Module) -> Adapter:
        return Policy(site, self.shortcut, self.evaluation)


@final
@dataclass(frozen=True)
class KeptOutput(Insertion):
    """Keeps a module's output in the records, for the adapter of the block around it."""

    def build(self, site: nn.Module) -> Adapter:  # noqa: ARG002
        return Keeping()


@final
class Keeping(InlineAdapter):
    """Records what its site gives and changes nothing."""

    def shared_names(self) -> frozenset[str]:
        return frozenset()

    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        output = inner(*args)
        call.records[site] = {"output": output}
        return output

    def fold(self, site: nn.Module) -> nn.Module:
        return site


class PolicyAdapter(InlineAdapter, ABC):
    """What static and gated policies share: the choice, its mixture, and the way around a block.

    Own tensors: ``logits`` (2,), to execute and to skip; the buffers ``temperature``, of samples
    while the choice is learned and 0 once it is made, and ``execute``, the choice.

    Args:
        block: the site.
        shortcut: its child that goes around the branch, or "".
        evaluation: how the block is chosen in eval mode while the choice is learned.
    """

    temperature: Tensor
    execute: Tensor

    def __init__(self, block: nn.Module, shortcut: str, evaluation: Draw) -> None:
        super().__init__()
        like = next(t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point())
        self.logits = nn.Parameter(like.new_zeros(2))
        self.register_buffer("temperature", like.new_zeros(()))
        self.register_buffer("execute", torch.tensor(True, device=like.device))
        self._evaluation = evaluation
        self._shortcut = shortcut
        self._block = (block,)  # in a tuple it is no module of this one

    @abstractmethod
    def executed(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        """The output where the task executes the block."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Which rows run through the block in eval mode where the task executes it.

        Returns:
            Booleans of a shape that broadcasts over outputs.
        """

    @abstractmethod
    def folded(self, site: nn.Module) -> nn.Module:
        """A plain module for the site where the task executes it.

        Raises:
            PlanError: there is none.
        """

    def forward(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        output = self._output(call, site, inner, *args)
        if self._shortcut:
            call.records.pop(f"{site}.{self._shortcut}", None)  # nobody else reads it
        return output

    def _output(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling() and not self.training:
            # One graph for all tasks and all choices: both ways are computed.
            chosen = torch.where(self.temperature > 0, self._by_logits(), self.execute)
            kept = chosen & self.rows(args[0])
            return torch.where(kept, inner(*args), self._kept(call, site, args[0]))
        temperature = self.temperature.item()
        if temperature > 0.0 and self.training:
            sample = F.gumbel_softmax(self.logits, tau=temperature)
            return self.mixed(sample[0], call, site, inner, *args)
        if self._by_logits() if temperature > 0.0 else self.execute:
            return self.executed(call, site, inner, *args)
        return self.around(args[0])

    def mixed(
        self, share: Tensor, call: Call, site: str, inner: Callable[..., Any], *args: Any
    ) -> Tensor:
        """``share * f + (1 - share) * r``: both ways, with gradients through both."""
        output: Tensor = inner(*args)
        return share * output + (1.0 - share) * self._kept(call, site, args[0])

    def around(self, x: Tensor) -> Tensor:
        """What goes around the branch."""
        if not self._shortcut:
            return x
        skipped: Tensor = getattr(self._block[0], self._shortcut)(x)
        return skipped

    def _kept(self, call: Call, site: str, x: Tensor) -> Tensor:
        """What goes around the branch, once the block has run: its child is not called again."""
        return call.records[f"{site}.{self._shortcut}"]["output"] if self._shortcut else x

    def _by_logits(self) -> Tensor:
        """Whether the block is executed in eval mode while the choice is learned."""
        if self._evaluation == "likely":
            return self.logits[0] >= self.logits[1]
        return torch.bernoulli(self.logits.detach().softmax(0)[0]) > 0

    def fold(self, site: nn.Module) -> nn.Module:
        learned = bool(self.temperature > 0)
        if learned and self._evaluation == "sample":
            raise PlanError(
                "A policy that is drawn anew in each forward has no plain form. Fold it once "
                "training has made the choice."
            )
        if self._by_logits() if learned else self.execute:
            return self.folded(site)
        around = site.get_submodule(self._shortcut) if self._shortcut else nn.Identity()
        return around if len(inspect.signature(site.forward).parameters) == 1 else _first(around)


def _first(around: nn.Module) -> nn.Module:
    """A module of PyTorch's that calls another one on its first input, whatever else it is given.

    Blocks of transformers are handed masks and the like, which a layer does not take.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    graph.output(graph.call_module("around", (x,)))
    return fx.GraphModule(nn.ModuleDict({"around": around}), graph, "First")


@final
class Policy(PolicyAdapter):
    """A task's choice for all of its inputs."""

    def shared_names(self) -> frozenset[str]:
        return frozenset()

    def executed(self, call: Call, site: str, inner: Callable[..., Any], *args: Any) -> Any:  # noqa: ARG002
        return inner(*args)

    def rows(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return torch.ones_like(self.execute)

    def folded(self, site: nn.Module) -> nn.Module:
        return site
