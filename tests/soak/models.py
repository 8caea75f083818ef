"""Random operations over every consumer of the EPC: the long profiles of the model tests.

Method: ``tests/model`` with another seed of Hypothesis, and more programs and schedules, each time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.soak import repeat

__all__ = ["run"]

_FILES = (
    *("test_random_programs", "test_guests", "test_guests_world", "test_guests_same"),
    *("test_hw_machine", "test_paging_core", "test_runtime"),
)


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""
    return repeat(seconds, seed, _history)


def _history(seed: int) -> dict[str, int]:
    name = _FILES[seed % len(_FILES)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", f"--hypothesis-seed={seed}", f"tests/model/{name}.py"]
    scale = {"SOFTSGX_PROGRAMS": "2", "SOFTSGX_GUESTS": "2"}
    told = subprocess.run(
        command, env=os.environ | scale, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, f"{' '.join(command[1:])}, {scale}:\n{told.stdout[-6000:]}"
    return {"model tests": sum(int(count) for count in re.findall(r"(\d+) passed", told.stdout))}
