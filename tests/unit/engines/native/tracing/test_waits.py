"""Statuses of threads that no event of their parent has reported yet.

Goal: a thread whose first stop arrives before its parent's event is adopted with that stop, and a
thread that has ended by then is not adopted.  Method: statuses as wait(2) encodes them.
"""

from __future__ import annotations

import signal
import subprocess

from softsgx.engines.native.tracing.waits import Waits

NO_THREAD = 1 << 22  # above the largest process id
STOPPED = signal.SIGSTOP << 8 | 0x7F
EXITED = 7 << 8


def test_a_first_stop_that_arrives_before_the_event_is_kept_for_it() -> None:
    waits = Waits()
    waits.keep_first(NO_THREAD, STOPPED)
    assert waits.first_stop(NO_THREAD) == STOPPED
    assert not waits.unreported


def test_a_thread_that_ends_before_its_event_has_no_first_stop() -> None:
    waits = Waits()
    waits.keep_first(NO_THREAD, STOPPED)
    waits.keep_first(NO_THREAD, EXITED)
    assert waits.first_stop(NO_THREAD) is None


def test_the_end_of_a_process_that_never_stopped_is_not_kept() -> None:
    waits = Waits()
    waits.keep_first(NO_THREAD, EXITED)
    assert not waits.unreported


def test_a_thread_that_was_reaped_has_no_first_stop() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert Waits().first_stop(child.pid) is None
