"""Comparisons: tasks x methods x options x seeds on one base, as one fleet that can go on."""

from .config import Comparison, read_comparison
from .fleet import (
    Fleet,
    FleetResult,
    compare,
    dry_fleet,
    make_fleet,
    open_fleet,
    part_of,
    run_fleet,
)
from .tables import table, write_tables

__all__ = [
    "Comparison",
    "Fleet",
    "FleetResult",
    "compare",
    "dry_fleet",
    "make_fleet",
    "open_fleet",
    "part_of",
    "read_comparison",
    "run_fleet",
    "table",
    "write_tables",
]
