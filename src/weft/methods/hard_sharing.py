"""Hard parameter sharing: the bottom or the top of the network is private, the rest is common.

Zhang, Yang, Liu, Guan, "Rethinking Hard-Parameter Sharing in Multi-Domain Learning", ICME 2022,
https://arxiv.org/abs/2107.11359.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from weft.core.options import Options
from weft.core.patch import Patch, Replace
from weft.core.sharing import Sharing
from weft.core.sites import Kind, Site, everything, sites
from weft.errors import PlanError, close_matches

OWN = "'bottom', 'top', 'nothing' or a list of patterns of module names"
"""What can be private, in words."""


def hard_sharing(
    base: nn.Module,
    *,
    own: Literal["bottom", "top", "nothing"] | Sequence[str] = "bottom",
    fraction: float = 0.1,
    batchnorm: Literal["private", "follow"] = "private",
) -> Sharing:
    """Each task owns some layers, usually the bottom or the top; the others train for all together.

    Source: Rethinking Hard-Parameter Sharing, section 3.

    Args:
        base: a module whose layers are registered in the order in which they run.
        own: which end of the network is private; "nothing"; or patterns (shell style) of the names
            of modules that are, each with all inside it, for instance ``["layer4", "*.conv1"]``.
        fraction: of the base's parameters, in (0, 1), for "bottom" and "top". The cut falls between
            layers, at the place nearest to the fraction; a layer keeps the normalisation that
            follows it. The ledger says what was reached.
        batchnorm: "private" gives each task the batch normalisation of the common part too, since
            statistics of mixed tasks fit none of them; "follow" shares it with its layer.

    Returns:
        The plan. Tasks train together; nothing is frozen.

    Raises:
        PlanError: a wrong option.

    Differs from the paper in that batch normalisation is private by default. Whether the paper's
    was is not known; it is an option because it confounds the comparison of bottom and top.
    """
    Options("hard_sharing").word("batchnorm", batchnorm, ("private", "follow"))
    if own == "nothing":
        private: list[Site] = []
    elif isinstance(own, str):
        private = _end(base, own, fraction)
    else:
        own = Options("hard_sharing").names("own", own, OWN)
        private = _named(base, own)
    patches: dict[str, Patch] = {n: Replace() for s in private for n in s.parameters + s.statistics}
    if batchnorm == "private":
        patches |= private_batchnorm(base)
    return Sharing(
        "hard_sharing",
        options={
            "own": own if isinstance(own, str) else list(own),
            "fraction": fraction,
            "batchnorm": batchnorm,
        },
        patches=patches,
        train_shared=everything(base) - patches.keys(),
    )


def private_batchnorm(base: nn.Module) -> dict[str, Patch]:
    """Every task owns the normalisations that have running statistics, with them."""
    normalised = [s for s in sites(base) if s.statistics]
    return {n: Replace() for s in normalised for n in s.parameters + s.statistics}


def _end(base: nn.Module, end: str, fraction: float) -> list[Site]:
    """The sites up to the cut, from the bottom or from the top."""
    if end not in ("bottom", "top"):
        raise PlanError(
            f"hard_sharing(own=...) is {OWN}, found {end!r}. One pattern is a list, too: "
            f"own=[{end!r}]."
        )
    Options("hard_sharing").number("fraction", fraction, "(0, 1)")
    units = _units(base)
    if len(units) < 2:
        raise PlanError(
            f"hard_sharing cuts between layers and needs at least two layers, found {len(units)}. "
            "Use linear_probe or full_finetune."
        )
    if end == "top":
        units.reverse()
    return [site for unit in units[: _cut(base, units, fraction)] for site in unit]


def _named(base: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """The sites at modules whose name matches, and inside of them."""
    names = [name for name, _ in base.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise PlanError(
                f"hard_sharing(own=[...]): no module is called '{pattern}'."
                + close_matches(pattern, names)
            )
        inside = tuple(f"{name}." for name in found)
        owned = [s for s in sites(base) if s.name in found or s.name.startswith(inside)]
        if not owned:
            raise PlanError(
                f"hard_sharing(own=[...]): '{pattern}' matches {', '.join(sorted(found)[:3])}, "
                "with no tensors to own. Name modules that have some."
            )
        chosen |= {site.name for site in owned}
    return [s for s in sites(base) if s.name in chosen]


def _units(base: nn.Module) -> list[list[Site]]:
    """Layers in order of registration, each with the normalisation that follows it."""
    units: list[list[Site]] = []
    for site in sites(base):
        if site.kind is Kind.NORM and units:
            units[-1].append(site)
        else:
            units.append([site])
    return units


def _cut(base: nn.Module, units: list[list[Site]], fraction: float) -> int:
    """How many units come nearest to the fraction, at least one and not all."""
    size = {name: p.numel() for name, p in base.named_parameters()}
    total, seen = sum(size.values()), set[str]()
    reached, distances = 0, []
    for unit in units:
        new = {n for s in unit for n in s.parameters} - seen
        seen |= new
        reached += sum(size[n] for n in new)
        distances.append(abs(reached / total - fraction))
    return 1 + min(range(max(len(units) - 1, 1)), key=distances.__getitem__)
