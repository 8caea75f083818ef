"""The child of a process that ends inside fork runs, though no event reports it.

Goal: no such child stays stopped.  Method: ``programs/orphans.c`` kills processes that fork without
pause, lets them execute a program beside that, or end, and waits for the end of all children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.children import end, running
from tests.support.ends import kill_at_event
from tests.support.native import needs_tracing

from softsgx.engines.native import abi, libc, run
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.orphans import (
    has_copy_of,
    may_report,
    parent_of,
    tracees,
)
from softsgx.engines.native.tracing.program import ProgramThread

CLONE_PARENT = 0x8000

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@pytest.mark.parametrize("device", [(), ("/dev/sgx_enclave",)], ids=["without", "device"])
@pytest.mark.parametrize("way", ["killed", "executes", "ends"])
def test_the_child_of_a_process_that_ends_inside_fork_runs(
    builds: NativeBuilds, way: str, device: tuple[str, ...], strict: bool
) -> None:
    argv = [builds.host("orphans"), way, "30", *device]
    assert run(argv, epc="1MiB", strict=strict).exit_code == 0


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@pytest.mark.parametrize("device", [(), ("/dev/sgx_enclave",)], ids=["without", "device"])
def test_the_sister_of_a_process_that_is_killed_in_clone_runs(
    builds: NativeBuilds, monkeypatch: pytest.MonkeyPatch, device: tuple[str, ...], strict: bool
) -> None:
    killed: list[int] = []
    born = Loop._born

    def killing(loop: Loop, parent: ProgramThread, event: int) -> None:
        if parent.load().rdi & CLONE_PARENT:
            killed.append(parent.tid)
            kill_at_event(parent.tid)
        born(loop, parent, event)

    monkeypatch.setattr(Loop, "_born", killing)
    argv = [builds.host("orphans"), "sister", "0", *device]
    assert run(argv, epc="1MiB", strict=strict).exit_code == 0
    assert len(killed) == 1


def test_only_a_thread_at_the_event_of_a_child_may_report_it() -> None:
    forks = [sys.executable, "-c", "import os; os.read(0, 1); os.fork(); os.read(0, 1)"]
    with running(forks, stdin=subprocess.PIPE) as parent:
        libc.ptrace(abi.PTRACE_SEIZE, parent.pid, 0, abi.PTRACE_O_TRACEFORK | abi.PTRACE_O_EXITKILL)
        assert parent.stdin is not None
        assert not may_report(parent.pid, 0)
        parent.stdin.write(b"x")
        parent.stdin.flush()
        _pid, status = os.waitpid(parent.pid, abi.WALL)
        assert status >> 16 == abi.PTRACE_EVENT_FORK
        (child,) = children_of(parent.pid)
        assert may_report(parent.pid, child) and not may_report(parent.pid, parent.pid)
        assert not may_report(child, child)
        libc.ptrace(abi.PTRACE_CONT, parent.pid)
        while is_elsewhere(parent.pid):
            pass
        assert not may_report(parent.pid, child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, abi.WALL)
        end(parent)  # it may have stopped for SIGCHLD
    assert not may_report(parent.pid, child)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_elsewhere(pid: int) -> bool:
    """Whether a process has not returned from its fork to a read yet."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] != "0"


def test_a_thread_that_waits_for_a_child_of_vfork_has_reported_it() -> None:
    reading, writing = os.pipe()
    vforks = f"import ctypes; ctypes.CDLL(None).vfork() or ctypes.CDLL(None).read({reading}, 0, 1)"
    with running([sys.executable, "-c", vforks], pass_fds=[reading]) as parent:
        while not children_of(parent.pid):
            pass
        assert not may_report(parent.pid, children_of(parent.pid)[0])
        os.close(writing)
        end(parent)
    os.close(reading)


def test_what_is_known_of_a_child_that_no_event_has_reported() -> None:
    with running(["sleep", "100"]) as child:
        lines = Path("/proc/self/maps").read_text().splitlines()
        vdso = next(int(line.split("-")[0], 16) for line in lines if line.endswith("[vdso]"))
        assert child.pid not in set(tracees())
        libc.ptrace(abi.PTRACE_SEIZE, child.pid, 0, abi.PTRACE_O_EXITKILL)
        assert child.pid in set(tracees())
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.extend(tracees()))
        other.start()
        other.join()
        assert child.pid not in seen
        assert parent_of(child.pid) == os.getpid()
        assert has_copy_of(os.getpid(), vdso) and not has_copy_of(os.getpid(), vdso + 4096)
        end(child)
    assert parent_of(child.pid) is None and not has_copy_of(child.pid, vdso)
