"""Processes that have nothing to do with an enclave stop rarely, and behave as without softsgx.

Goal: few stops for each fork, execve and end, and the same results.  Method: shell and Python
programs whose stops are counted in the supervisor; ends of every kind whose statuses the parent
prints.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.native import needs_free_calls, needs_tracing

from softsgx.engines.native import abi, run
from softsgx.engines.native.doctor import can_fault_cpuid
from softsgx.engines.native.images import AddressSpaces
from softsgx.engines.native.mappings import file_code
from softsgx.engines.native.tracing import tasks, tracee
from softsgx.engines.native.tracing.fresh import CopiedImage
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tasks import Tasks
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.x86.rewrite import cpuid_sites

#: How often a program stops to have the CPUIDs in its C library replaced, if it has any.
REPLACED = (
    0
    if can_fault_cpuid()
    else sum(
        bool(cpuid_sites(Path(each.path).read_bytes()))
        for each in file_code(os.getpid())
        if Path(each.path).name.startswith("libc.so")
    )
)
pytestmark = needs_tracing

FORKS = """
import os
for each in range(20):
    pid = os.fork()
    if not pid:
        os._exit(each)
    assert os.waitpid(pid, 0) == (pid, each << 8)
"""
#: Twenty directories of PATH have no such program.
SPAWNS = """
import os
absent = ":".join(f"/nowhere/{each}" for each in range(20))
for each in range(10):
    pid = os.fork()
    if not pid:
        os.execvpe("true", ["true"], {"PATH": absent + ":/bin:/usr/bin"})
    assert os.waitpid(pid, 0) == (pid, 0)
"""
VFORKS = """
import os
for each in range(20):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {each}"], {})
    assert os.waitpid(pid, 0) == (pid, each << 8)
"""
MANY = """
import os
read, write = os.pipe()
pids = []
for each in range(60):
    pids.append(os.fork())
    if not pids[-1]:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
os.close(write)
for pid in pids:
    assert os.waitpid(pid, 0) == (pid, 0)
"""
#: Its child outlives it, and stops for nothing before it ends.
DAEMON = """
import os, time
if not os.fork():
    time.sleep(0.3)
    os.write(1, b"ran")
    os._exit(0)
"""
ENDS = """
import os, resource, signal, sys, threading

def child(do):
    pid = os.fork()
    if not pid:
        try:
            do()
        finally:
            os._exit(99)
    return os.waitpid(pid, 0)[1]

def in_thread(do):
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()

def orphan():
    read, write = os.pipe()
    if not os.fork():
        os.close(write)
        os.read(read, 1)  # until the parent has ended
        os._exit(0)
    os._exit(5)

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print("exit", child(lambda: os._exit(3)))
print("kill", child(lambda: os.kill(os.getpid(), signal.SIGKILL)))
print("term", child(lambda: os.kill(os.getpid(), signal.SIGTERM)))
print("abort", child(os.abort))
print("orphan", child(orphan))
print("thread exits", child(lambda: in_thread(lambda: os._exit(4))))
shell = ["sh", "-c", "exit 6"]
print("thread executes", child(lambda: in_thread(lambda: os.execv("/bin/sh", shell))))
print("nested", child(lambda: os._exit(child(lambda: os._exit(7)) >> 8)))
print("no program", child(lambda: os.execv("/nowhere", ["nowhere"])))

stopped = os.fork()
if not stopped:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(8)
print("stopped", os.waitpid(stopped, os.WUNTRACED)[1])
os.kill(stopped, signal.SIGCONT)
print("continued", os.waitpid(stopped, 0)[1])

signals = []
signal.signal(signal.SIGCHLD, lambda *_: signals.append(1))
print("told", child(lambda: os._exit(9)), len(signals))
sleeper = os.fork()
if not sleeper:
    signal.pause()
os.kill(sleeper, signal.SIGKILL)
print("killed asleep", os.waitpid(sleeper, 0)[1])
"""


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often threads have stopped, by kind."""
    names = {
        value: name.removeprefix("PTRACE_EVENT_")
        for name, value in vars(abi).items()
        if name.startswith("PTRACE_EVENT_")
    }
    counted: Counter[str] = Counter()
    decode: Callable[[int], Stop] = tracee.decode_stop

    def decoded(status: int) -> Stop:
        stop = decode(status)
        counted[names[stop.event] if stop.event else "END" if stop.syscall else "SIGNAL"] += 1
        return stop

    monkeypatch.setattr(tracee, "decode_stop", decoded)
    monkeypatch.setattr(tasks, "decode_stop", decoded)
    return counted


def python(program: str, **options: object) -> None:
    assert run([sys.executable, "-S", "-c", program], epc="1MiB", **options).exit_code == 0  # type: ignore[arg-type]


def counted(stops: Counter[str], program: str) -> Counter[str]:
    python("")
    before = Counter(stops)
    stops.clear()
    python(program)
    stops.subtract(before)
    return stops


@needs_free_calls
def test_a_child_stops_once_and_its_parent_for_it_and_for_its_signal(
    stops: Counter[str],
) -> None:
    found = counted(stops, FORKS)
    assert found["FORK"] == found["STOP"] == found["SIGNAL"] == 20
    assert found["EXIT"] == found["END"] == 0
    looks = 20 if sys.version_info >= (3, 12) else 0  # its fork() opens /proc/self/stat
    assert sum(found.values()) < 65 + looks, "few stops for paths may be there"


@needs_free_calls
def test_an_execve_stops_at_its_event_only_and_a_failing_one_never(stops: Counter[str]) -> None:
    found = counted(stops, SPAWNS)
    assert found["EXEC"] == 10
    assert (found["EXIT"], found["END"]) == (0, 10 * REPLACED)
    assert found["SECCOMP"] < 100, "200 of them fail"


@needs_free_calls
def test_a_parent_in_vfork_does_not_stop_at_its_end(stops: Counter[str]) -> None:
    found = counted(stops, VFORKS)
    assert found["VFORK"] == found["EXEC"] == 20
    assert (found["EXIT"], found["END"]) == (0, 20 * REPLACED)


@needs_free_calls
def test_processes_that_need_nothing_cost_no_descriptor() -> None:
    command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--", sys.executable, "-S", "-c"]
    limited = ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command, MANY]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_ends_are_those_of_the_same_program_alone(tmp_path: Path, strict: bool) -> None:
    argv = [sys.executable, "-S", "-c", ENDS]
    alone = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    with (tmp_path / "out").open("w+") as out:
        result = run(argv, epc="1MiB", strict=strict, stdio=(0, out.fileno(), 2))
        out.seek(0)
        assert out.read() == alone
    assert result.exit_code == 0
    assert alone.count("\n") == 13


@needs_free_calls
def test_a_child_that_only_ends_has_no_address_space_and_one_that_executes_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[int] = []
    fork = AddressSpaces.fork

    def noting(
        spaces: AddressSpaces, tid: int, parent: ProcessImage | CopiedImage, waits: Waits
    ) -> ProcessImage:
        copied.append(tid)
        return fork(spaces, tid, parent, waits)

    monkeypatch.setattr(AddressSpaces, "fork", noting)
    python(FORKS)
    assert not copied
    python(SPAWNS)
    assert len(copied) == 10


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_a_child_that_outlives_its_parent_is_part_of_the_run(tmp_path: Path, strict: bool) -> None:
    with (tmp_path / "out").open("w+") as out:
        python(DAEMON, strict=strict, stdio=(0, out.fileno(), 2))
        out.seek(0)
        assert out.read() == "ran"


@needs_free_calls
def test_a_child_that_has_not_stopped_yet_ends_with_a_run_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children: list[int] = []

    def failing(self: Tasks, _tid: int, parent: ProgramThread, _event: int, _flags: int) -> bool:
        if fresh(self, _tid, parent, _event, _flags):
            children.append(_tid)
            raise KeyboardInterrupt
        return False

    fresh = Tasks._is_fresh
    monkeypatch.setattr(Tasks, "_is_fresh", failing)
    with pytest.raises(KeyboardInterrupt):
        python("import os, time; os.fork() or time.sleep(100)")
    (child,) = children
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
