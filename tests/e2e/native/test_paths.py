"""Calls with paths have the same results with a stop and without one; most have none.

Goal: ordinary programs are fast, and no path that concerns SGX escapes the supervisor.  Method: a
program of the C library makes each call often, with jumps in the library and without.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, PROGRAMS, NativeBuilds
from tests.support.native import needs_free_calls, needs_tracing

from softsgx.engines.native import run, supervisor
from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.syscalls.paths import NamedFiles

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2"),
]


def build(directory: Path) -> None:
    assert COMPILER is not None
    words = [COMPILER, "-O1", "-pthread", str(PROGRAMS / "paths.c"), "-o", str(directory / "paths")]
    subprocess.run(words, check=True)


@pytest.fixture
def program(builds: NativeBuilds) -> Path:
    return builds.directory("paths", build) / "paths"


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, int]:
    """How often a call with a path has stopped."""
    found: dict[bytes, int] = {}
    node = NamedFiles._node

    def counted(self: NamedFiles, thread: Any, place: Any) -> Any:
        name = thread.image.read_string(place.path)
        found[name] = found.get(name, 0) + 1
        return node(self, thread, place)

    monkeypatch.setattr(NamedFiles, "_node", counted)
    return found


def output(program: Path, directory: Path, *arguments: str) -> str:
    directory.mkdir()
    with (directory / "out").open("w+") as out:
        argv = [str(program), str(directory), *arguments]
        done = run(argv, epc=1 << 20, stdio=(0, out.fileno(), 2))
        out.seek(0)
        assert done.exit_code == 0
        return out.read()


@pytest.mark.slow
@needs_free_calls
def test_calls_give_the_same_with_a_stop_and_without(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: dict[bytes, int]
) -> None:
    fast = output(program, tmp_path / "fast")
    few = dict(stops)
    stops.clear()
    monkeypatch.setattr(supervisor, "can_answer_cpuid", lambda: False)
    assert output(program, tmp_path / "slow") == fast
    # A call that a signal meets when it has failed with ENOENT is made again, with a stop.
    for name, most in ((b"/nonexistent/file", 2000), (b"/dev/null", 10)):
        assert few.get(name, 0) < most < 20_000 <= stops[name]
    assert few[b"/dev/sgx_enclave"] == stops[b"/dev/sgx_enclave"]
    assert "!" not in fast
    assert "wrong 0 in our code 0" in fast
    assert fast.count("device: 1 8192 wrong 0") == 2
    assert fast.count("link: 16 /dev/sgx_enclave") == 2
    assert "cpuinfo: 1" in fast
    assert "unreadable : -1 14\nfaults: 0\n" in fast
    assert fast.count("no end: -1 14\n") == 6


def test_a_path_that_may_be_a_node_always_stops(program: Path, tmp_path: Path) -> None:
    text = output(program, tmp_path / "run")
    for name in ("/dev/sgx_enclave", "/dev/sgx/provision"):
        assert f"access {name}: 0 0\n" in text
        assert f"readlink {name}: -1 22\n" in text
        assert f"stat {name}: 8192 0\n" in text
        assert f"statx {name}: 8192 0\n" in text
        assert f"open {name}: 0 0\n" in text
    assert "stat /dev/sgx: 16384 0\n" in text
    assert "stat /proc/cpuinfo: 32768 0\n" in text
    assert text.count("across /dev/sgx_enclave: 8192 0\n") == 11


def test_no_code_is_replaced_while_another_thread_may_execute_it(
    program: Path, tmp_path: Path, stops: dict[bytes, int]
) -> None:
    calls = output(program, tmp_path / "run", "threads").count("file: ")
    assert stops[b"file"] == 6 * calls + 1  # it is made first
