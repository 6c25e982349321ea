"""Which modules of a base a configuration of PEFT names, by PEFT's own rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from weft.adapters.low_rank import is_linear

from .document import Described, Names

PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
"""The class of models that know their output layer."""


def adapted(base: nn.Module, described: Described, inside: str) -> list[str]:
    """The modules of a base that a configuration gives low rank.

    Args:
        base: the base.
        described: the configuration.
        inside: what comes before the base's names in PEFT's base, with its dot, or "".

    Returns:
        Their names in the base; none if the configuration does not say which.
    """
    modules = {name: module for name, module in base.named_modules() if name}
    target = described.target_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        output = None if inside else _output_layer(base)
        found = [name for name, m in modules.items() if is_linear(m) and m is not output]
    else:
        found = [name for name in modules if _targeted(inside + name, described)]
    return [name for name in found if not _excluded(inside + name, described)]


def stored_by(name: str, entries: Iterable[str]) -> str:
    """The entry of ``modules_to_save`` by which a tensor is stored with its module, or "".

    Args:
        name: of the tensor, in PEFT's base.
        entries: ends of names of modules; PEFT compares letters and does not mind dots.
    """
    modules = [name[:at] for at, letter in enumerate(name) if letter == "."]
    return next((e for e in entries if any(m.endswith(e) for m in modules)), "")


def _output_layer(base: Any) -> nn.Module | None:
    """What "all-linear" leaves out of a model of transformers."""
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(base).__mro__)
    return base.get_output_embeddings() if PRETRAINED in kinds else None


def _targeted(name: str, described: Described) -> bool:
    target = described.target_modules
    if isinstance(target, str) or target is None or name in target:
        return _matches(name, target)
    return _matches(name, target) and _in_chosen_layer(name, described)


def _excluded(name: str, described: Described) -> bool:
    entries = "|".join(map(re.escape, described.modules_to_save))
    stored = bool(entries) and re.match(rf"(.*\.)?({entries})(\.|$)", name) is not None
    return stored or _matches(name, described.exclude_modules)


def _matches(name: str, names: Names | None) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)


def _in_chosen_layer(name: str, described: Described) -> bool:
    """Whether the number in a name is one of ``layers_to_transform``."""
    if not described.layers_to_transform:
        return True
    found = None
    if not described.layers_pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    for pattern in described.layers_pattern:
        found = found or re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
    return found is not None and int(found[found.lastindex or 0]) in described.layers_to_transform
