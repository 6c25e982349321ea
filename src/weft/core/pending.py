"""Backwards still to come: known from the graphs of outputs, without holding on to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class _Token:
    """Lives in the graph of one output until its backward has run or the graph is dropped."""

    done: bool = False


class Pending:
    """The outputs whose backward may still come; true while there are any."""

    def __init__(self) -> None:
        self._tokens: weakref.WeakSet[_Token] = weakref.WeakSet()

    def __bool__(self) -> bool:
        return any(not token.done for token in self._tokens)

    def add(self, outputs: Any) -> bool:
        """Wait for the backward of these outputs.

        Args:
            outputs: tensors of any shape, in any structure.

        Returns:
            Whether any of them can have a backward.
        """
        found = False
        for tensor in _tensors(outputs):
            node = tensor.grad_fn
            if node is None:
                continue
            token = _Token()
            self._tokens.add(token)
            # The node keeps the token alive; the hook must not, or the graph would keep itself.
            metadata: Any = node.metadata  # a property that is declared as a method
            metadata[("weft", id(token))] = token
            node.register_prehook(_settles(weakref.ref(token)))
            found = True
        return found


def _settles(reference: weakref.ref[_Token]) -> Callable[[Any], None]:
    def at_end_of_backward() -> None:
        token = reference()
        if token is not None:
            token.done = True

    def prehook(_: Any) -> None:
        # A graph that is kept may run backward again; it ends the wait when it is dropped.
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            torch.autograd.Variable._execution_engine.queue_callback(at_end_of_backward)

    return prehook


def _tensors(structure: Any, depth: int = 2) -> Iterator[Tensor]:
    """The tensors in a structure; objects unknown to pytree are looked into by their attributes."""
    for leaf in pytree.tree_leaves(structure):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth:
            yield from _tensors(getattr(leaf, "__dict__", {}), depth - 1)
