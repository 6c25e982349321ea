"""Leaving: a task as a file that others read, without weft."""

from .formats import FORMATS, Format, export

__all__ = ["FORMATS", "Format", "export"]
