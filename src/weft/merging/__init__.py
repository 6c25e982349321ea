"""Merging: several tasks made into one set of tensors."""

from .concrete import Figures, collapse, concrete
from .merge import SCALES, Merged, merge
from .rules import ties, trim

__all__ = ["SCALES", "Figures", "Merged", "collapse", "concrete", "merge", "ties", "trim"]
