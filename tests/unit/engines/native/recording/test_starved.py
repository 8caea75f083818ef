"""An interval waits for threads that have faulted and have not executed since.

Method: threads whose state and turns on a processor the test sets.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native.recording import starved
from softsgx.engines.native.recording.starved import Starved

RIP = 0x1000


class Thread:
    """As a thread of the program is to what is tested."""

    def __init__(self, tid: int) -> None:
        self.tid, self.regs = tid, SimpleNamespace(rip=RIP)


class Kernel:
    """What Linux says of threads: a state, and how often each was given a processor."""

    def __init__(self) -> None:
        self.states: dict[int, bytes] = {}
        self.turns: dict[int, int] = {}
        self.followed = Starved()

    def thread(self, tid: int) -> Any:
        self.states[tid], self.turns[tid] = b"R", 1
        return Thread(tid)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(starved, "_state", made.states.__getitem__)
    monkeypatch.setattr(starved, "_turns", made.turns.__getitem__)
    return made


def test_a_thread_that_was_not_scheduled_since_its_fault_is_waited_for(kernel: Kernel) -> None:
    one, other = kernel.thread(1), kernel.thread(2)
    kernel.followed.resuming(one, faulted=True)
    kernel.followed.resuming(other, faulted=False)
    assert kernel.followed.any()
    kernel.turns[1] += 1
    assert not kernel.followed.any()
    kernel.followed.begin()
    assert not kernel.followed.follows
    assert not kernel.followed.any()


@pytest.mark.parametrize("state", [b"S", b"D", b"T", b"Z"])
def test_a_thread_that_waits_for_something_else_is_not_waited_for(
    kernel: Kernel, state: bytes
) -> None:
    thread = kernel.thread(1)
    kernel.followed.resuming(thread, faulted=True)
    kernel.states[1] = state
    assert not kernel.followed.any()


def test_a_stop_at_the_same_instruction_is_no_progress_and_one_elsewhere_is(
    kernel: Kernel,
) -> None:
    thread = kernel.thread(1)
    kernel.followed.resuming(thread, faulted=True)
    assert kernel.followed.any()
    kernel.turns[1] += 1
    kernel.followed.resuming(thread, faulted=False)  # it was interrupted
    assert kernel.followed.any()
    kernel.turns[1] += 1
    kernel.followed.resuming(thread, faulted=True)  # its next page
    assert kernel.followed.any()
    thread.regs.rip += 5
    kernel.turns[1] += 1
    kernel.followed.resuming(thread, faulted=True)
    assert not kernel.followed.any(), "a fault elsewhere belongs to the next interval"


def test_a_thread_that_faults_again_and_again_at_one_instruction_ends_the_interval(
    kernel: Kernel,
) -> None:
    thread = kernel.thread(1)
    kernel.followed.resuming(thread, faulted=True)
    waits = 0
    while kernel.followed.any():
        waits += 1
        kernel.followed.resuming(thread, faulted=True)
    assert waits == 64


def test_a_thread_that_stays_stopped_does_not_delay_intervals_for_ever(kernel: Kernel) -> None:
    thread = kernel.thread(1)
    kernel.followed.resuming(thread, faulted=True)
    kernel.states[1] = b"t"
    looks = 0
    while kernel.followed.any():
        looks += 1
    assert looks == 63


def test_a_kernel_that_does_not_count_turns_delays_nothing(kernel: Kernel) -> None:
    thread = kernel.thread(1)
    kernel.turns[1] = 0
    kernel.followed.resuming(thread, faulted=True)
    assert not kernel.followed.any()


def test_linux_says_what_a_thread_does() -> None:
    assert starved._turns(1 << 30) == 0
    assert starved._state(1 << 30) == b"Z"
    assert starved._state(os.getpid()) == b"R"
    before = starved._turns(os.getpid())
    if before:
        os.sched_yield()
        assert starved._turns(os.getpid()) >= before
