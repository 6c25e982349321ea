"""Folding: a plain module with one task baked in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import DataError, PlanError

from .agreement import AGREEMENT, difference
from .drawing import varied
from .rows import Arguments, Output, count_rows, select_output, select_rows
from .sharing import Sharing
from .sites import tensor_slots
from .structure import SLOT, replace_child

TRIED_ROWS = 2
"""Rows on which a folded network is tried."""

TF32 = 1e-2
"""What devices may round by whose convolutions take fewer digits than their types have."""

MISFIT = 0.05
"""From here on a difference is none of rounding, in whatever precision a network computes."""

MISFIT_IN_HALF = 0.5
"""The same for tensors of 16 bits, whose roundings add up over many layers."""

_ADVICE = (
    "The base does more with a module that an adapter stands at than to call it: it reads its "
    "attributes or its tensors, or a hook changes what it gives. Leave that module out of the "
    "plan, for instance by exclude=[...] of weft.lora."
)
"""What to say about a folded network that is not the task."""


def fold(base: nn.Module, tensors: Mapping[str, Tensor], sharing: Sharing) -> nn.Module:
    """A module of the base's class that computes what a task computes, without its head.

    Args:
        base: the model's base.
        tensors: every tensor that runs for the task, by name.
        sharing: the task's plan.

    Returns:
        A module with tensors of its own; tied tensors stay tied.

    Raises:
        PlanError: an adapter of the plan has no plain form.
    """
    new = {name: _own(tensor) for name, tensor in tensors.items()}
    slots = tensor_slots(base)
    parameters = {n for n, table, a in slots if isinstance(table[a], nn.Parameter)}
    memo: dict[int, Any] = {
        id(table[a]): _parameter(new[n]) if n in parameters else new[n] for n, table, a in slots
    }
    plain = copy.deepcopy(base, memo)
    # Initial values are thrown away: random numbers drawn for them would change what others do.
    with torch.random.fork_rng(devices=[]):
        _fold_adapters(plain, new, sharing)
    return plain


def check_plain(
    plain: nn.Module,
    of_task: Callable[[Arguments], Tensor],
    batch: Arguments,
    output: Output,
    device: torch.device,
) -> None:
    """Refuse a plain module that does not compute what a task computes.

    Args:
        plain: the module; what a forward would keep in it, it keeps in a copy.
        of_task: what the task gives for a batch.
        batch: inputs; numbers that are all the same are drawn anew.
        output: what is read of the module's output.
        device: where they run.

    Raises:
        PlanError: their outputs differ by more than any rounding. Between that and what rounding
            should give there is a warning.
    """
    rows = count_rows(*batch)
    with suppress(DataError):  # some of it belongs to no row: then all of it
        batch = select_rows(batch, range(min(rows, TRIED_ROWS)), rows)
    batch = varied(batch)
    args, kwargs = batch
    tried = copy.deepcopy(plain, {id(p): p for p in plain.parameters()}).eval()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        expected = of_task(batch)
        try:
            found = select_output(tried(*args, **kwargs), output)
        except Exception as error:  # whatever a module does where a child is another
            raise PlanError(f"The folded network fails: {error}. {_ADVICE}") from error
        types = {t.dtype for t in (*plain.parameters(), expected)} & AGREEMENT.keys()
        rounding = max((AGREEMENT[dtype] for dtype in types), default=MISFIT)
        if device.type != "cpu":
            rounding = max(rounding, TF32)
        apart = difference(found, expected)
        if apart <= rounding or difference(of_task(batch), expected) > 0.0:
            return  # or it draws numbers, so that nothing can be told
    half = any(dtype.itemsize < 4 for dtype in types)
    if apart > (MISFIT_IN_HALF if half else MISFIT):
        raise PlanError(f"The folded network computes something else than the task. {_ADVICE}")
    warnings.warn(
        f"The folded network differs from the task by {apart:.0e} of its largest output, more than "
        f"rounding alone should. If not for low precision inside: {_ADVICE}",
        stacklevel=4,
    )


def _fold_adapters(plain: nn.Module, new: Mapping[str, Tensor], sharing: Sharing) -> None:
    # The innermost sites first: folding an outer one may move what is inside.
    for site in sorted(sharing.adapters, key=lambda s: -s.count(".")):
        inner = plain.get_submodule(site)
        adapter = sharing.adapters[site].build(inner)
        for name, table, attribute in tensor_slots(adapter):
            value = new[site + SLOT + name]
            is_parameter = isinstance(table[attribute], nn.Parameter)
            table[attribute] = _parameter(value) if is_parameter else value
        replace_child(plain.modules(), inner, adapter.fold(inner))


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
