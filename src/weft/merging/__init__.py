"""Merging: several tasks made into one set of tensors."""

from .choosing import SCALES
from .concrete import concrete
from .entropy import Figures, collapse
from .merge import merge
from .merged import Merged
from .rules import ties, trim

__all__ = ["SCALES", "Figures", "Merged", "collapse", "concrete", "merge", "ties", "trim"]
