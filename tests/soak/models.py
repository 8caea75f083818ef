"""Random operations over every consumer of the EPC: the long profiles of the model tests.

Method: ``tests/model`` with another seed of Hypothesis, and more programs and schedules, each time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

__all__ = ["run"]

_FILES = (
    *("test_random_programs", "test_guests", "test_guests_world", "test_guests_same"),
    *("test_hw_machine", "test_paging_core", "test_runtime"),
)


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""
    until, done = time.monotonic() + seconds, 0
    passed = 0
    while not done or time.monotonic() < until:
        name = _FILES[(seed + done) % len(_FILES)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:xdist", f"--hypothesis-seed={seed + done}"]
        command.append(f"tests/model/{name}.py")
        scale = {"SOFTSGX_PROGRAMS": "2", "SOFTSGX_GUESTS": "2"}
        told = subprocess.run(
            command, env=os.environ | scale, capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, f"{' '.join(command[1:])}, {scale}:\n{told.stdout[-6000:]}"
        passed += sum(int(count) for count in re.findall(r"(\d+) passed", told.stdout))
        done += 1
    return {"model tests": passed}
