"""Statuses of threads that no event of their parent has reported yet.

Goal: a thread whose first stop arrives before its parent's event is adopted with that stop, and a
thread that has ended by then is not adopted.  Method: statuses as wait(2) encodes them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess

import pytest

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.tracing.tracee import Gone, Thread
from softsgx.engines.native.tracing.waits import Waits

NO_THREAD = 1 << 22  # above the largest process id
STOPPED = signal.SIGSTOP << 8 | 0x7F
EXITED = 7 << 8
EXECUTED = abi.PTRACE_EVENT_EXEC << 16 | signal.SIGTRAP << 8 | 0x7F


def test_a_first_stop_that_arrives_before_the_event_is_kept_for_it() -> None:
    waits = Waits()
    waits.keep_first(NO_THREAD, STOPPED)
    assert waits.first_stop(NO_THREAD) == STOPPED
    assert not waits.unreported


def test_a_first_stop_that_another_wait_has_received_is_found() -> None:
    waits = Waits()
    waits.keep(NO_THREAD + 1, EXITED)
    waits.keep(NO_THREAD, STOPPED)
    assert waits.first_stop(NO_THREAD) == STOPPED
    assert list(waits.kept) == [(NO_THREAD + 1, EXITED)]


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


def test_a_look_comes_at_its_time_and_the_wait_goes_on() -> None:
    waits, times = Waits(), []

    def look() -> None:
        times.append(waits.clock())
        if len(times) < 3:
            waits.look_at(look, waits.clock() + 5_000_000)

    with waits.signals_blocked():
        child = subprocess.Popen(["sleep", "0.2"])
        waits.look_at(look, waits.clock() + 5_000_000)
        before = waits.clock()
        event = waits.next()
    assert event is not None
    assert event[:2] == (child.pid, 0)
    assert waits.look_ns is None
    assert len(times) == 3
    assert times[0] - before >= 5_000_000
    assert times[2] - times[0] >= 10_000_000
    child.returncode = 0


def test_a_wait_ends_when_its_thread_has_taken_over_the_id_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leader, waits = NO_THREAD + 1, Waits()
    reports = [(NO_THREAD + 2, STOPPED), (leader, EXECUTED)]

    def former_id(request: int, tid: int, _address: int, data: int) -> int:
        assert (request, tid) == (abi.PTRACE_GETEVENTMSG, leader)
        ctypes.c_uint64.from_address(data).value = NO_THREAD
        return 0

    monkeypatch.setattr(os, "waitid", lambda *_arguments: None)
    monkeypatch.setattr(os, "waitpid", lambda *_arguments: reports.pop(0))
    monkeypatch.setattr(kernel, "try_ptrace", former_id)
    with pytest.raises(ChildProcessError):
        waits.of(NO_THREAD)
    assert list(waits.kept) == [(NO_THREAD + 2, STOPPED), (leader, EXECUTED)]


def test_a_program_in_the_place_of_a_thread_is_left_to_the_loop() -> None:
    waits = Waits()
    waits.keep(NO_THREAD, EXECUTED)
    thread = Thread(NO_THREAD, waits)
    with pytest.raises(Gone):
        thread.wait()
    assert list(waits.kept) == [(NO_THREAD, EXECUTED)]
    assert thread.wait(executes=True).event == abi.PTRACE_EVENT_EXEC


def test_the_stop_of_one_thread_comes_before_those_of_older_ones() -> None:
    waits = Waits()
    with subprocess.Popen(["true"]) as older, subprocess.Popen(["true"]) as younger:
        for child in (older, younger):
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert waits.stop_of(younger.pid) == (younger.pid, 0, 0)
        assert waits.stop_of(younger.pid) is None
        waits.keep(NO_THREAD, STOPPED)
        assert waits.stop_of(older.pid) is None, "what is kept is earlier"
    assert waits.stop_of(NO_THREAD) is None


def test_each_thread_that_has_stopped_has_its_turn() -> None:
    waits = Waits()
    with subprocess.Popen(["true"]) as one, subprocess.Popen(["true"]) as other:
        for child in (one, other):
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        waits.keep(NO_THREAD, STOPPED)
        waits.keep_all()
        assert waits.kept.popleft() == (NO_THREAD, STOPPED), "what was kept before is earlier"
        assert sorted(waits.kept) == sorted([(one.pid, 0), (other.pid, 0)])
        waits.keep_all()
        assert len(waits.kept) == 2


@pytest.mark.parametrize("keeps_exits", [False, True])
def test_a_thread_whose_end_is_kept_ends(
    monkeypatch: pytest.MonkeyPatch, *, keeps_exits: bool
) -> None:
    waits = Waits(keeps_exits=keeps_exits)
    let: list[int] = []
    exiting = abi.PTRACE_EVENT_EXIT << 16 | signal.SIGTRAP << 8 | 0x7F
    reports = [(NO_THREAD, exiting), (NO_THREAD + 1, STOPPED), (0, 0)]
    monkeypatch.setattr(os, "waitpid", lambda *_arguments: reports.pop(0))
    monkeypatch.setattr("softsgx.engines.native.tracing.waits.let_end", let.append)
    waits.keep_all()
    assert list(waits.kept) == [(NO_THREAD, exiting), (NO_THREAD + 1, STOPPED)]
    assert let == ([] if keeps_exits else [NO_THREAD])


def test_looks_come_at_their_own_times() -> None:
    now, done = [0], []
    waits = Waits(clock=lambda: now[0])

    def first() -> None:
        done.append(("first", now[0]))

    def second() -> None:
        done.append(("second", now[0]))
        waits.look_at(second, now[0] + 10)

    waits.look_now()
    waits.look_at(first, 30)
    waits.look_at(first, 20)
    waits.look_at(first, 40)
    waits.look_at(second, 10)
    assert waits.look_ns == 10
    for now[0] in (5, 10, 15):
        waits.look_now()
    assert (done, waits.look_ns) == ([("second", 10)], 20)
    now[0] = 20
    waits.look_now()
    assert sorted(done) == [("first", 20), ("second", 10), ("second", 20)]
    waits.look_at(second, None)
    waits.look_at(second, None)
    assert waits.look_ns is None
