"""Leaving: a task as a file that others read, without weft."""

from .formats import FORMATS, SUFFIXES, Format, chosen_format, export

__all__ = ["FORMATS", "SUFFIXES", "Format", "chosen_format", "export"]
