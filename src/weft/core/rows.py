"""Batches: how inputs reach the base, how rows are picked, and how outputs come back in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import DataError, close_matches


def call_arguments(
    inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the base: a single tuple or dict of tensors is spread out."""
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        return tuple(inputs[0]), dict(kwargs)
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), {**inputs[0], **kwargs}
    return inputs, dict(kwargs)


def count_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of a batch: the first size of its first tensor."""
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return 0


def select_rows(batch: Any, index: Tensor) -> Any:
    """The given rows of every tensor of a batch."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.index_select(0, index.to(t.device)) if t.dim() else t, batch
    )


def select_output(output: Any, which: str | int | Callable[[Any], Tensor] | None) -> Tensor:
    """What heads read of the base's output.

    Args:
        output: what the base returned.
        which: a key or attribute, an index, a function, or None for a tensor as it is.

    Raises:
        DataError: the base returned a structure and nothing or something wrong was asked for.
    """
    if callable(which):
        return which(output)
    if which is None:
        if isinstance(output, Tensor):
            return output
        raise DataError(
            f"The base returns {_describe(output)}, not a tensor. "
            "Say what heads read: MultiTaskModel(base, sharing, output=...)."
        )
    try:
        if isinstance(which, str) and not isinstance(output, Mapping):
            value = getattr(output, which)
        else:
            value = output[which]
    except (AttributeError, KeyError, IndexError, TypeError):
        known = [str(k) for k in output] if isinstance(output, Mapping) else []
        raise DataError(
            f"output={which!r} is not in {_describe(output)}.{close_matches(str(which), known)}"
        ) from None
    if not isinstance(value, Tensor):
        raise DataError(f"output={which!r} is {_describe(value)}, not a tensor.")
    return value


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def assemble(outputs: Mapping[str, Any], rows: Mapping[str, Tensor]) -> Tensor | list[Any]:
    """Outputs of groups of rows, back in row order.

    Args:
        outputs: by task, the output for that task's rows, rows first.
        rows: by task, the rows' places in the batch.

    Returns:
        One tensor if all outputs agree in shape and type, otherwise a list of rows.
    """
    tensors = list(outputs.values())
    plain = [t for t in tensors if isinstance(t, Tensor)]
    order = torch.cat([*rows.values()]) if rows else torch.empty(0, dtype=torch.long)
    if not tensors:
        return []
    one_shape = len({(t.shape[1:], t.dtype) for t in plain}) == 1
    if len(plain) == len(tensors) and one_shape:
        joined = torch.cat(plain)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return joined.index_select(0, inverse.to(joined.device))
    result: list[Any] = [None] * len(order)
    for name, index in rows.items():
        for i, place in enumerate(index.tolist()):
            result[place] = pytree.tree_map_only(Tensor, lambda t, i=i: t[i], outputs[name])
    return result
