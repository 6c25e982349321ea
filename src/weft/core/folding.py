"""Folding: a plain module with one task baked in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharing import Sharing
from .sites import tensor_slots
from .structure import SLOT, replace_child


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
