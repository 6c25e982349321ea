"""The bank: tasks on disk, each a bundle of what it owns, next to the base that they share."""

from .bank import Bank
from .verifying import Problem

__all__ = ["Bank", "Problem"]
