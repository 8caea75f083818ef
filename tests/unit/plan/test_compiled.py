"""Kernels are cached where the user can write, and run without any cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from softsgx.plan import compiled

SCRIPT = """
import numpy as np
from softsgx.plan.policies import misses
print(misses("fifo", [np.array([1, 2, 1], np.uint32)], [1, 2]))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    left_out = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"HOME": str(home)} | more


def run(where: dict[str, str], script: str = SCRIPT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=where, text=True, capture_output=True, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_machine_code_is_cached_in_the_users_directory(tmp_path: Path) -> None:
    assert run(environment(tmp_path)) == "[3, 2]\n"
    assert list((tmp_path / ".cache/softsgx/numba").rglob("*.nbc"))
    other = tmp_path / "other"
    assert run(environment(tmp_path, XDG_CACHE_HOME=str(other))) == "[3, 2]\n"
    assert list((other / "softsgx/numba").rglob("*.nbc"))


PLAN = """
from softsgx.accesses import Trace
from softsgx.plan import PlannedTrace, plan
told = []
trace = Trace.of([(page % 60, False) for page in range(300)])
plan([PlannedTrace(trace)], progress=lambda what, _done, _of: told.append(what))
print([what for what in told if "compiling" in what], "reading traces" in told)
"""


@pytest.mark.slow
def test_the_first_plan_says_that_it_compiles_and_the_second_does_not(tmp_path: Path) -> None:
    both = "['compiling the curve, once', 'compiling the replay, once'] True\n"
    assert [run(environment(tmp_path), PLAN) for _ in "12"] == [both, "[] True\n"]


def test_other_sources_have_another_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = compiled.cache_directory()
    (tmp_path / "kernels.py").write_text("changed")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    compiled._digest_of_sources.cache_clear()
    try:
        after = compiled.cache_directory()
    finally:
        monkeypatch.undo()
        compiled._digest_of_sources.cache_clear()
    assert after != before == compiled.cache_directory()
    assert after.parent == before.parent


@pytest.mark.slow
def test_kernels_run_where_no_cache_can_be_made() -> None:
    assert run(environment(Path("/proc/nowhere"))) == "[3, 2]\n"
