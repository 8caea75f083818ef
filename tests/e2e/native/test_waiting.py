"""Threads wait in the kernel for pages, and nothing shows that but the time.

Goal: faults are events where that is possible; what happens to a thread that waits (signals, stops
of its process, other threads at the same page) is as at a stop; the supervisor's other ways to
learn of faults give the same results.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support import modes
from tests.support.native import USABLE_PAGERS, needs_pages_that_stay, needs_tracing

from softsgx.engines.native import abi, run
from softsgx.engines.native.faults import plain
from softsgx.engines.native.tracing import fault_events, tracee, waits
from softsgx.engines.native.tracing.tracee import Stop

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
    pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd"),
]

PAGES, EPC = 60, 40 * 4096
no_events = modes.has("strict", "recorded", "mprotect", "signals")
needs_events = pytest.mark.skipif(no_events, reason="in this mode no fault is an event")


@pytest.fixture(params=["events", "signals"])
def program(
    request: pytest.FixtureRequest, builds: NativeBuilds, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The program, and how its faults are reported."""
    if request.param == "signals":
        monkeypatch.setattr(waits, "can_wait_for_events", lambda: False)
    return [builds.host("waiting"), builds.enclave(PAGES, 4)]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals of the stops of threads, in their order."""
    signals: list[int] = []
    decode: Callable[[int], Stop] = tracee.decode_stop

    def decoded(status: int) -> Stop:
        stop = decode(status)
        if not stop.event and not stop.syscall:
            signals.append(stop.signal)
        return stop

    monkeypatch.setattr(tracee, "decode_stop", decoded)
    monkeypatch.setattr(plain, "serve", plain.serve_in_python)  # C decodes none
    return signals


@pytest.mark.parametrize(
    "what",
    ["blocked", pytest.param("timer", marks=needs_pages_that_stay), "together", "asked", "system"],
)
def test_what_happens_to_a_waiting_thread_is_as_at_a_stop(program: list[str], what: str) -> None:
    if what == "blocked" and (no_events or not fault_events.can_wait_for_events()):
        pytest.skip("a signal that a fault forces resets its handler, and unblocks it")
    assert run([*program, what], epc=EPC, pager="userfaultfd").exit_code == 0


#: Prints how many pages were loaded, and the signals of all stops.
COUNTS = """
import json, sys
from softsgx.engines.native import run
from softsgx.engines.native.faults import plain
from softsgx.engines.native.tracing import tracee

signals, decode = [], tracee.decode_stop

def decoded(status):
    stop = decode(status)
    if not stop.event and not stop.syscall:
        signals.append(stop.signal)
    return stop

tracee.decode_stop, plain.serve = decoded, plain.serve_in_python
result = run(sys.argv[2:], epc=int(sys.argv[1]), pager="userfaultfd")
print(json.dumps([result.exit_code, result.counters["eldu"], signals]))
"""


@needs_events
def test_few_faults_stop_a_thread(builds: NativeBuilds) -> None:
    """The supervisor has a process of its own: other tests may have left threads in this one."""
    argv = [builds.host("longrun"), builds.enclave(PAGES), str(20 * PAGES)]
    counted = subprocess.run(
        [sys.executable, "-c", COUNTS, str(EPC), *argv], capture_output=True, text=True, check=True
    )
    exit_code, reloads, signals = json.loads(counted.stdout)
    assert exit_code == 0 and reloads > 10 * PAGES
    assert signals.count(abi.SIGBUS) == 0
    assert len(signals) < reloads / 4, "the calls that drop entries of watched pages stop, too"


def test_where_another_thread_takes_sigchld_faults_are_signals(
    builds: NativeBuilds, faults: list[int]
) -> None:
    ends, begun = threading.Event(), threading.Event()

    def other() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        begun.set()
        ends.wait()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    try:
        assert not fault_events.can_wait_for_events()
        argv = [builds.host("longrun"), builds.enclave(PAGES), str(4 * PAGES)]
        result = run(argv, epc=EPC, pager="userfaultfd")
    finally:
        ends.set()
        thread.join()
    assert result.exit_code == 0
    if not modes.has("strict", "recorded", "mprotect"):
        assert faults.count(abi.SIGBUS) > PAGES


def test_a_thread_in_another_pid_namespace_is_found(builds: NativeBuilds) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-p", "-f", "true"], check=False).returncode:
        pytest.skip("this user may not make a PID namespace")
    argv = [unshare, "-p", "-f", builds.host("longrun"), builds.enclave(PAGES), str(6 * PAGES)]
    result = run(argv, epc=EPC, pager="userfaultfd")
    assert result.exit_code == 0


def test_the_end_of_a_run_closes_what_it_waited_on(builds: NativeBuilds) -> None:
    argv = [builds.host("longrun"), builds.enclave(PAGES), str(2 * PAGES)]
    run(argv, epc=EPC)
    before = sorted(os.listdir("/proc/self/fd"))
    assert run(argv, epc=EPC).exit_code == 0
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_killed_thread_that_waits_is_gone(builds: NativeBuilds, tmp_path: Path) -> None:
    """Its process ends in the middle of faults, again and again."""
    host, enclave = builds.host("longrun"), builds.enclave(PAGES)
    script = f"for each in 1 2 3 4 5 6; do timeout -s KILL 0.3 {host} {enclave} 10000000; done"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "softsgx",
            "run",
            "--epc",
            str(EPC),
            "--quiet",
            "--",
            "sh",
            "-c",
            script,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (137, ""), done.stderr
