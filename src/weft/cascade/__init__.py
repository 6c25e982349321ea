"""Several resolutions of one task, and cascades that stop as soon as they are sure."""

from .cascade import Answers, Cascade
from .curve import Curve, Point
from .resolutions import Resized, Stage, add_resolutions

__all__ = [
    "Answers",
    "Cascade",
    "Curve",
    "Point",
    "Resized",
    "Stage",
    "add_resolutions",
]
