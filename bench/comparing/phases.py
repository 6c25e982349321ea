"""Where the seconds of small cells go: start of a process, then the parts of each cell.

The cells are those of jobs.py. Parts are measured inside one process; a profiler takes a share of
its own of each. Run on a machine that does nothing else:
python bench/comparing/phases.py [--epochs 12]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import CodeType

sys.path.insert(0, str(Path(__file__).parents[1]))
from jobs import prepare

from timing import machine
from weft.comparing import make_fleet, read_comparison
from weft.comparing.attempts import attempt

PARTS = {
    "base, data and model": (
        ("assembly.py", "load_experiment_base"),
        ("assembly.py", "read_data"),
        ("assembly.py", "make_model"),
    ),
    "training steps": (("run.py", "_train_steps"),),
    "validation": (("run.py", "_scores"),),
    "checkpoints": (("checkpoint.py", "save"),),
    "history": (("history.py", "write"),),
    "rows that are right, for paired comparisons": (("running.py", "_correct"),),
    "bank": (("bank.py", "save"),),
    "latency": (("measuring.py", "latency"),),
    "all": (("attempts.py", "attempt"),),
}
"""Functions by file and name, whose time with all that they call is a part."""


def seconds_to_start() -> float:
    """Of a process that does nothing but import weft, the second time."""
    command = [sys.executable, "-c", "import weft.comparing"]
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run(command, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        began = time.perf_counter()
        fleet = make_fleet(read_comparison(prepare(Path(name), given.epochs)))
        listing = time.perf_counter() - began
        attempt(fleet.cells[0], lambda _: None)  # what happens once in a process
        profile = cProfile.Profile()
        profile.enable()
        measured = fleet.cells[1:12]
        for cell in measured:
            assert attempt(cell, lambda _: None).end == "finished"
        profile.disable()
        os.chdir("/")
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"start of a process, once for each of the jobs: {seconds_to_start():.2f} s")
    print(f"list of cells, once: {listing:.2f} s")
    for part, functions in PARTS.items():
        spent = sum(
            entry.totaltime
            for entry in profile.getstats()
            for file, function in functions
            if isinstance(entry.code, CodeType)
            and entry.code.co_name == function
            and entry.code.co_filename.endswith(f"/{file}")
        )
        print(f"{part}, of each cell: {1000 * spent / len(measured):.0f} ms")


if __name__ == "__main__":
    main()
