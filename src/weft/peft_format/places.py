"""Which own tensors of a task are which tensors of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from weft.adapters.low_rank import LowRank
from weft.core.adapter import Insertion
from weft.core.patch import Patch, Replace
from weft.core.structure import SLOT
from weft.errors import PlanError

from .layers import groups_of, names, refusal


@dataclass(frozen=True)
class Place:
    """The two factors of one layer.

    Args:
        site: the name of the layer.
        layer: the layer.
        r: how many rows PEFT's A has.
        here: what is inserted at the layer.
    """

    site: str
    layer: nn.Module
    r: int
    here: LowRank

    @property
    def keys(self) -> tuple[str, str]:
        """Of the own tensors A and B."""
        return f"{self.site}{SLOT}A", f"{self.site}{SLOT}B"

    @property
    def tensors(self) -> tuple[str, str]:
        """What PEFT calls the factors, without prefix."""
        a, b = names(self.layer)
        return f"{self.site}.{a}", f"{self.site}.{b}"

    @property
    def alpha(self) -> float:
        """The numerator by which PEFT computes the same factor from its own rank."""
        if self.r == self.here.r:
            return self.here.alpha
        return self.here.scale * (self.r**0.5 if self.here.rslora else self.r)


def places(
    base: nn.Module, adapters: Mapping[str, Insertion], patches: Mapping[str, Patch]
) -> Iterator[Place]:
    """Where the factors of a plan are.

    Args:
        base: the base.
        adapters: by site, what is inserted.
        patches: by tensor, how it changes; whole tensors are left out.

    Raises:
        PlanError: names what PEFT has no form for, or computes otherwise.
    """
    for name, patch in patches.items():
        if not isinstance(patch, Replace):
            module = name.rpartition(".")[0]
            reason = refusal(base.get_submodule(module))
            reason = reason or f"PEFT's LoRA has no form for {type(patch).__name__}"
            raise PlanError(f"'{name}': {reason}.")
    for site, insertion in adapters.items():
        if not isinstance(insertion, LowRank):
            raise PlanError(f"'{site}': PEFT's LoRA has no form for {type(insertion).__name__}.")
        layer = base.get_submodule(site)
        if reason := refusal(layer):
            raise PlanError(f"'{site}': {reason}.")
        groups = groups_of(layer)
        yield Place(site, layer, -(-insertion.r // groups) * groups, insertion)


def exactly(wanted: Iterable[str], base: nn.Module, inside: str = "") -> tuple[str, ...] | str:
    """Names as PEFT's target_modules, which match these modules of a base and no others.

    Args:
        wanted: the names.
        base: the base.
        inside: what comes before all names in PEFT's base, which has more modules.

    Returns:
        A tuple, or a regular expression where names may end alike.
    """
    mine = tuple(sorted(set(wanted)))
    everything = [name for name, _ in base.named_modules()]
    ends = tuple(f".{name}" for name in mine)
    if inside or any(name.endswith(ends) and name not in mine for name in everything):
        return "|".join(re.escape(f"{inside}{name}") for name in mine)
    return mine


def pattern_of(name: str) -> str:
    """A name as a pattern that matches it and no longer one."""
    return f"^{re.escape(name)}"
