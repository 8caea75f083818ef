"""A thread that waits for a page and is asked to stop is at a stop by SIGBUS, for all who ask it.

Method: a program that loops; the tests ask it to stop as if it had waited for a page.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.native import needs_tracing
from tests.support.tracees import end_tracee

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.bpf import build_filter
from softsgx.engines.native.tracing.fault_events import FaultEvent
from softsgx.engines.native.tracing.start import start_program
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits

ADDRESS = 0x7000_1234
SIGBUS = Stop(abi.SIGBUS, 0, False)
BUS_BIT = 1 << abi.SIGBUS - 1
LOOPS = "trap 'exit 9' USR1; while :; do :; done"


@pytest.fixture
def thread() -> Iterator[Thread]:
    """A thread that has set its handler, and runs."""
    started = start_program(["/bin/sh", "-c", LOOPS], build_filter(), Waits())
    started.resume()
    while not _handles_usr1(started.tid):
        stop = started.waits.next(started.waits.clock() + 1_000_000)
        if stop is not None:
            started.stopped(*stop[1:])
            started.resume()
    yield started
    end_tracee(started.tid)


def _handles_usr1(tid: int) -> bool:
    with open(f"/proc/{tid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> signal.SIGUSR1 - 1 & 1)


def ask(thread: Thread) -> Stop:
    thread.waits.asked[thread.tid] = ADDRESS
    thread.interrupt()
    return thread.wait()


def end(thread: Thread) -> int:
    """Let it run to its end; return its exit status."""
    while True:
        try:
            thread.wait()
        except Gone:
            return os.waitstatus_to_exitcode(thread.waits.of(thread.tid))
        thread.resume()


@needs_tracing
def test_the_stop_is_that_of_a_fault_at_the_address(thread: Thread) -> None:
    assert ask(thread) == SIGBUS
    assert thread.at_signal and not thread.waits.asked
    info = thread.siginfo()
    assert (info.signo, info.code, info.addr) == (abi.SIGBUS, abi.BUS_ADRERR, ADDRESS)


@needs_tracing
def test_a_thread_that_stops_for_a_signal_first_is_at_no_fault(thread: Thread) -> None:
    thread.waits.asked[thread.tid] = ADDRESS
    os.kill(thread.tid, signal.SIGUSR1)
    assert thread.wait() == Stop(signal.SIGUSR1, 0, False)
    assert not thread.waits.asked
    thread.interrupt()
    thread.resume()
    assert thread.wait() == Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)


@needs_tracing
def test_a_stop_of_the_whole_process_is_no_fault(thread: Thread) -> None:
    os.kill(thread.tid, signal.SIGSTOP)
    assert thread.wait() == Stop(signal.SIGSTOP, 0, False)
    thread.waits.asked[thread.tid] = ADDRESS
    thread.resume(signal.SIGSTOP)
    assert thread.wait() == Stop(signal.SIGSTOP, abi.PTRACE_EVENT_STOP, False)


@needs_tracing
@pytest.mark.parametrize("blocked", [0, BUS_BIT])
@pytest.mark.parametrize("waits", [False, True], ids=["alone", "another signal waits"])
def test_a_signal_is_delivered_there(thread: Thread, blocked: int, waits: bool) -> None:
    assert ask(thread) == SIGBUS
    thread.set_sigmask(blocked)
    if waits:
        os.kill(thread.tid, signal.SIGWINCH)
    thread.resume(signal.SIGUSR1)
    assert end(thread) == 9


@needs_tracing
def test_its_information_can_be_replaced_and_its_mask_stays(thread: Thread) -> None:
    assert ask(thread) == SIGBUS
    thread.set_sigmask(BUS_BIT)
    before = bytes(thread.load())
    info = abi.SigInfo(signo=signal.SIGUSR1, code=-1)
    thread.set_siginfo(info)
    assert thread.sigmask() == BUS_BIT
    assert bytes(thread.load()) == before
    assert thread.siginfo().signo == signal.SIGUSR1
    thread.resume(signal.SIGUSR1)
    assert end(thread) == 9


@needs_tracing
def test_a_wait_for_one_thread_lets_those_stop_that_wait_for_pages(thread: Thread) -> None:
    """The supervisor may wait for that very thread."""
    events = [FaultEvent(5, thread.tid, ADDRESS, 0)]
    thread.waits.faults = cast(
        Any,
        SimpleNamespace(
            images={5: None},
            may_have_stopped=False,
            wait=lambda _limit_s: events.pop() if events else None,
            thread=lambda _event: thread,
        ),
    )
    assert thread.wait() == SIGBUS
    assert thread.waits.faults is not None and thread.waits.faults.may_have_stopped


@needs_tracing
def test_without_a_signal_it_goes_on(thread: Thread) -> None:
    assert ask(thread) == SIGBUS
    thread.resume()
    thread.interrupt()
    assert thread.wait() == Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)


@pytest.mark.parametrize("events", [False, True])
def test_no_request_of_the_pager_wakes_a_thread_where_faults_are_events(
    monkeypatch: pytest.MonkeyPatch, events: bool
) -> None:
    modes: list[int] = []
    monkeypatch.setattr(kernel, "copy_page", lambda _uffd, _at, mode, _data: modes.append(mode))
    monkeypatch.setattr(
        kernel, "protect_pages", lambda _uffd, _start, _end, mode: modes.append(mode)
    )
    closed: list[int] = []
    pager = UffdPager(
        os.open(os.devnull, os.O_RDONLY),
        os.open(os.devnull, os.O_RDONLY),
        inject=lambda _calls: None,
        running=lambda: True,
        prot_at=lambda _at: abi.PROT_READ,
        failed=lambda _error: None,
        close_events=closed.append if events else None,
    )
    pager.show(0x1000, bytes(4096), abi.PROT_READ)
    pager.show(0x1000, bytes(4096), abi.PROT_READ | abi.PROT_WRITE)
    pager.shown(0x1000, abi.PROT_READ)
    pager.set_rights(0x1000, abi.PROT_READ | abi.PROT_WRITE)
    pager.before_hide(0x1000, 0x2000)
    copy, unprotect = abi.UFFDIO_COPY_MODE_DONTWAKE, abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
    protect = abi.UFFDIO_WRITEPROTECT_MODE_WP
    dontwake = int(events)
    assert modes == [
        abi.UFFDIO_COPY_MODE_WP | copy * dontwake,
        copy * dontwake,
        protect,
        unprotect * dontwake,
        protect,
    ]
    pager.close()
    assert bool(closed) == events
