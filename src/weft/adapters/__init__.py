"""Adapters: what may be inserted into a base, by name for files."""

from weft.core.adapter import Insertion

INSERTIONS: dict[str, type[Insertion]] = {}

__all__ = ["INSERTIONS", "Insertion"]
