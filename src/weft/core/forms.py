"""Forms of modules: what modules have in common that compute alike with exchanged tensors."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sites import named_tensors, tensor_slots


@dataclass(frozen=True)
class Alone:
    """The form of a module that no other one has.

    Args:
        identity: of the module.
    """

    identity: int


_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


def form_of(module: nn.Module | None) -> Hashable:
    """Equal for modules that compute alike once their tensors are exchanged.

    Args:
        module: in eval mode.

    Returns:
        Something that no other module has where that is unknown: the module has hooks, is in
        training mode, or holds something else than modules, tensors and plain values.
    """
    if module is None:
        return None
    slots = tuple(
        (name, attribute, table[attribute].shape, table[attribute].dtype)
        for name, table, attribute in tensor_slots(module)
    )
    first: dict[int, str] = {}  # a module that is there twice is known by its first place
    parts = tuple(
        (path, first.setdefault(id(child), path), *_part(child))
        for path, child in module.named_modules(remove_duplicate=False)
    )
    return (slots, parts) if all(None not in part for part in parts) else Alone(id(module))


def _part(module: nn.Module) -> tuple[type, tuple[tuple[str, str], ...] | None]:
    """A module's type and plain attributes; None where its form is its own."""
    values = vars(module)
    hooked = any(
        values[name] for name in _EVERY_MODULE if name.endswith("hooks") and name in values
    )
    if module.training or hooked:
        return type(module), None
    attributes = [(k, v) for k, v in values.items() if k not in _EVERY_MODULE]
    if not all(_is_plain(value) for _, value in attributes):
        return type(module), None
    return type(module), tuple((key, repr(value)) for key, value in attributes)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors have their shapes and no memory of their own."""
    memo: dict[int, Any] = {id(tensor): _hollow(tensor) for _, tensor in named_tensors(module)}
    return copy.deepcopy(module, memo)


def _hollow(tensor: Tensor) -> Tensor:
    value = tensor.detach().new_zeros(()).expand(tensor.shape)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(value, requires_grad=False) if is_parameter else value
