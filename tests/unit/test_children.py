"""Children of tests: each one ends, also where its test fails or hangs.

Method: a test suite of its own whose test waits for a child and never receives its timeout; blocks
that raise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.children import end, running
from tests.support.native import needs_tracing
from tests.support.overdue_watcher import descendants

from softsgx.engines.native import abi, libc

ROOT = Path(__file__).parents[2]

HANGS = """
import signal, subprocess
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # the timeout waits for the child's end

def test_waits():
    with subprocess.Popen(["sh", "-c", "sleep 1234 & wait"], stdout=subprocess.PIPE) as child:
        assert child.stdout.read() == b""  # its end is that of both
    assert child.returncode == -signal.SIGKILL
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

def test_is_next():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "worker"])
def test_a_test_whose_child_does_not_end_fails_and_the_next_one_runs(
    workers: list[str], tmp_path: Path
) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(HANGS)
    options = ["-p", "tests.support.overdue", "--overdue-grace", "0.1", "--timeout", "0.2"]
    command = [sys.executable, "-m", "pytest", "-q", *options, *workers, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(suite)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == 1, done
    assert "FAILED test_suite.py::test_waits - Failed: Timeout" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    told = [line for line in done.stderr.splitlines() if "does not end after its timeout" in line]
    assert told and told[0].startswith("test_suite.py::test_waits: ")
    assert any("sleep 1234" in line for line in told)


@needs_tracing
def test_a_tracee_is_found_also_when_its_parent_has_ended() -> None:
    forks = ["sh", "-c", "sleep 1234 >&- & echo $!; read line"]
    pipe = subprocess.PIPE
    with subprocess.Popen(forks, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        try:
            assert {parent.pid, orphan} <= descendants(os.getpid())
            libc.ptrace(abi.PTRACE_SEIZE, orphan, 0, abi.PTRACE_O_EXITKILL)
            parent.communicate("\n")
            assert orphan in descendants(os.getpid())
        finally:
            os.kill(orphan, signal.SIGKILL)
    os.waitpid(orphan, abi.WALL)


class Mistake(Exception):
    """A failed assertion of a test."""


def fail_beside(command: list[str], stream: int, *, group: bool) -> None:
    with running(command, group=group, stdout=stream):
        os.close(stream)
        raise Mistake


@pytest.mark.parametrize(
    ("command", "group"),
    [
        (["sleep", "1234"], False),
        (["sleep", "1234"], True),
        (["sh", "-c", "sleep 1234 & wait"], True),
    ],
    ids=["child", "leader", "group"],
)
def test_a_child_ends_with_the_block_that_raises(command: list[str], group: bool) -> None:
    read, write = os.pipe()
    with pytest.raises(Mistake):
        fail_beside(command, write, group=group)
    assert os.read(read, 1) == b""  # no process has the other end
    os.close(read)


@needs_tracing
def test_a_tracee_that_has_stopped_ends() -> None:
    """As the parent of a child that was killed: it stops for SIGCHLD."""
    with running(["sleep", "1234"]) as child:
        libc.ptrace(abi.PTRACE_SEIZE, child.pid, 0, abi.PTRACE_O_EXITKILL)
        os.kill(child.pid, signal.SIGCHLD)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        end(child)
    assert child.returncode == -signal.SIGKILL
