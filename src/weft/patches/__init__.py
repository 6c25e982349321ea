"""Patches: the ways in which one tensor changes, by name for files."""

from weft.core.patch import Patch, Replace

from .gated import GatedResidual, GatedTuned
from .low_rank import LowRankSum
from .mixture import Mixture
from .modulated import Modulated, Offset

PATCHES: dict[str, type[Patch]] = {
    "replace": Replace,
    "gated_tuned": GatedTuned,
    "gated_residual": GatedResidual,
    "low_rank_sum": LowRankSum,
    "mixture": Mixture,
    "modulated": Modulated,
    "offset": Offset,
}

__all__ = [
    "PATCHES",
    "GatedResidual",
    "GatedTuned",
    "LowRankSum",
    "Mixture",
    "Modulated",
    "Offset",
    "Patch",
    "Replace",
]
