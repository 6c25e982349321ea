"""Patches: the ways in which one tensor changes, by name for files."""

from weft.core.patch import Patch, Replace

from .gated import GatedResidual, GatedTuned

PATCHES: dict[str, type[Patch]] = {
    "replace": Replace,
    "gated_tuned": GatedTuned,
    "gated_residual": GatedResidual,
}

__all__ = ["PATCHES", "GatedResidual", "GatedTuned", "Patch", "Replace"]
