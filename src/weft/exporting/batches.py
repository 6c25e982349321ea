"""Examples: the batches on which a graph is captured and checked."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.core.model import MultiTaskModel
from weft.core.rows import Arguments, call_arguments, count_rows
from weft.errors import DataError


@final
@dataclass(frozen=True)
class Example:
    """Inputs of the base with rows first, on the CPU.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        rows: how many rows they have; a tensor of another first size goes along whole.
        positional: names of the positional inputs.
        tasks: how many tasks the rows of a batch are of; 0 if there is no such input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    positional: tuple[str, ...]
    tasks: int = 0

    def batch(self, rows: int) -> Arguments:
        """A batch of any number of rows: those of the example over and over, the later ones moved.

        Whole numbers stay what they are, since another one may mean nothing (a token, a category).
        """
        index = torch.arange(rows) % self.rows
        generator = torch.Generator().manual_seed(rows)

        def resized(tensor: Tensor) -> Tensor:
            if not self.has_rows(tensor):
                return tensor
            chosen = tensor[index]
            spread = tensor.float().std(correction=0) if tensor.is_floating_point() else None
            if spread is not None and rows > self.rows and spread.isfinite():
                noise = torch.randn(chosen[self.rows :].shape, generator=generator)
                chosen[self.rows :] += (0.3 * spread * noise).to(chosen)
            return chosen

        args, kwargs = pytree.tree_map_only(Tensor, resized, (self.args, self.kwargs))
        if self.tasks:
            kwargs["task"] = torch.arange(rows).flip(0) % self.tasks  # in no ascending order
        return args, kwargs

    def choosing(self, tasks: int) -> Example:
        """The same with an input ``task`` that says which of so many tasks a row is of.

        Raises:
            DataError: the base has an input of that name.
        """
        if "task" in self.arguments:
            raise DataError(
                "The base has an input 'task' of its own. Give it by position, or export one task."
            )
        chosen = torch.zeros(self.rows, dtype=torch.long)
        return replace(self, kwargs={**self.kwargs, "task": chosen}, tasks=tasks)

    def has_rows(self, value: Any) -> bool:
        """Whether this is a tensor with a place for each row."""
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.rows

    @property
    def arguments(self) -> dict[str, Any]:
        """All inputs by name, positional ones first."""
        return {**dict(zip(self.positional, self.args, strict=True)), **self.kwargs}

    @property
    def names(self) -> list[str]:
        """A name for each tensor among the inputs."""
        leaves, _ = pytree.tree_flatten_with_path(self.arguments)
        return [joined(path) for path, leaf in leaves if isinstance(leaf, Tensor)]

    def dynamic(self, dimension: Any) -> dict[str, Any]:
        """By input, that its first dimension is the rows', as exporters want to be told it."""
        told: dict[str, Any] = pytree.tree_map(
            lambda value: {0: dimension} if self.has_rows(value) else None, self.arguments
        )
        return told


def example_of(model: MultiTaskModel, given: Any) -> Example:
    """The example that a graph is captured on.

    Args:
        model: its own example is taken if none is given.
        given: one batch as the model takes it: a tensor, tuple or dict of tensors, rows first.

    Raises:
        DataError: there is none, or it has no rows.
    """
    chosen = model.example if given is None else given
    if chosen is None:
        raise DataError(
            "A graph is captured on an example. Give one batch, rows of one suffice: "
            "weft.export(..., example=x)."
        )
    args, kwargs = call_arguments((chosen,), {})
    rows = count_rows(args, kwargs)
    if rows == 0:
        raise DataError(f"The example has no rows: found {_described(args, kwargs)}.")
    floats = (t.dtype for t in model.base.state_dict().values() if t.is_floating_point())
    dtype = next(floats, torch.get_default_dtype())

    def fitted(tensor: Tensor) -> Tensor:
        moved = tensor.detach().cpu().clone()
        return moved.to(dtype) if moved.is_floating_point() else moved

    args, kwargs = pytree.tree_map_only(Tensor, fitted, (args, kwargs))
    return Example(args, kwargs, rows, _positional(model.base, len(args)))


def _positional(base: nn.Module, count: int) -> tuple[str, ...]:
    """How the base's forward calls its first inputs."""
    parameters = inspect.signature(base.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    known = [p.name for p in parameters if p.kind in kinds][:count]
    return (*known, *(f"input_{i}" for i in range(len(known), count)))


def described(batch: Arguments) -> str:
    """The shapes of a batch's tensors, for messages."""
    return _described(*batch)


def _described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = pytree.tree_leaves((args, kwargs))
    shapes = [str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor)]
    return f"shape {' and '.join(shapes)}" if shapes else "no tensor"


def joined(path: tuple[Any, ...]) -> str:
    """A place in a structure of tensors as one name."""
    return "_".join(map(_key_name, path))


def _key_name(key: Any) -> str:
    if isinstance(key, pytree.MappingKey):
        return str(key.key)
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    if isinstance(key, pytree.GetAttrKey):
        return key.name
    return str(key)
