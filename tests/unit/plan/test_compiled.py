"""Kernels are cached where the user can write, and run without any cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import numpy as np
from softsgx.plan.policies import misses
print(misses("fifo", [np.array([1, 2, 1], np.uint32)], [1, 2]))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    left_out = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"HOME": str(home)} | more


def run(where: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=where, text=True, capture_output=True, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_machine_code_is_cached_in_the_users_directory(tmp_path: Path) -> None:
    assert run(environment(tmp_path)) == "[3, 2]\n"
    assert list((tmp_path / ".cache/softsgx/numba").rglob("*.nbc"))
    other = tmp_path / "other"
    assert run(environment(tmp_path, XDG_CACHE_HOME=str(other))) == "[3, 2]\n"
    assert list((other / "softsgx/numba").rglob("*.nbc"))


@pytest.mark.slow
def test_kernels_run_where_no_cache_can_be_made() -> None:
    assert run(environment(Path("/proc/nowhere"))) == "[3, 2]\n"
