"""When signals pause for a thread inside, for how long, and which signal mask it has then.

Method: a thread, the clock and its processor time are stand-ins; a pause ends by calls of the looks
that the waits would do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.faults import pauses
from softsgx.engines.native.faults.exits import block_signals_again
from softsgx.engines.native.faults.pauses import SignalPauses, begin_again
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.tracing.waits import Waits

FAULTS = abi.FAULT_SIGNALS
ALL_OTHERS = (1 << 64) - 1 & ~FAULTS
USR1, MS = 1 << 9, 1_000_000
ALARM, QUEUED, SEGV = 14, 34, abi.SIGSEGV
AEP, ERESUME = 0x40_1000, 3


class Fake(SimpleNamespace):
    """A namespace that can be an element of a set."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Scene:
    """A thread with a timer; its mask is what the kernel would have."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, mask: int = USR1, *, usable: bool = True
    ) -> None:
        self.now = self.ran = self.interrupts = 0
        self.waits = Waits(clock=lambda: self.now)
        self.pauses = SignalPauses(self.waits, usable=usable)
        self.mask, self.code = mask, b"\x0f\x01\xd7"
        self.regs = NativeRegisters()
        self.thread: Any = Fake(
            tid=7,
            regs=self.regs,
            load=lambda: self.regs,
            sigmask=lambda: self.mask,
            set_sigmask=self._set,
            blocked=None,
            running=False,
            went_in=b"",
            held_up=0,
            pause_ns=0,
            paused_until_ns=0,
            ran_ns=0,
        )
        threads = {7: self.thread}
        self.thread.image = SimpleNamespace(threads=threads, read=lambda _at, _size: self.code)
        monkeypatch.setattr(pauses, "_run_time_ns", lambda _thread: self.ran)
        monkeypatch.setattr(kernel, "try_ptrace", self._ptrace)

    def _set(self, mask: int) -> None:
        self.mask = mask

    def _ptrace(self, request: int, tid: int, _address: int, _data: int) -> int:
        assert (request, tid) == (abi.PTRACE_INTERRUPT, 7)
        self.interrupts += 1
        return 0

    def inside(self, rip: int = 0x1000) -> None:
        """The thread goes in, where it has left."""
        self.regs.rip, self.regs.rax = rip, 1
        self.pauses.went_in(self.thread)

    def signal(self, **changed: int) -> None:
        """A signal stops the thread inside."""
        for name, value in changed.items():
            setattr(self.regs, name, value)
        self.pauses.interrupted(self.thread)

    def held_up(self) -> None:
        """Two signals find it where it went in, and it is back."""
        for _ in range(2):
            self.inside()
            self.signal()
        self.inside()

    def pass_time(self, milliseconds: int, *, ran: int) -> None:
        """Let time pass, in which it runs for ``ran`` milliseconds, and do what is due."""
        self.now += milliseconds * MS
        self.ran += ran * MS
        self.waits.look_now()

    def go(self, number: int = 0) -> None:
        self.pauses.going(self.thread, number)


def test_two_signals_where_it_went_in_begin_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.inside()
    scene.signal()
    scene.inside()
    assert (scene.mask, scene.thread.pause_ns) == (USR1, 0)
    scene.signal()
    scene.inside()
    assert scene.mask == ALL_OTHERS
    assert (scene.thread.blocked, scene.thread.held_up) == (USR1, 0)
    assert (scene.thread.pause_ns, scene.waits.look_ns) == (2 * MS, 2 * MS)


@pytest.mark.parametrize("name", ["rip", "rsp", "rax", "r15", "rdi"])
def test_a_thread_that_has_executed_an_instruction_gets_no_pause(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scene = Scene(monkeypatch)
    for number in range(4):
        scene.inside()
        scene.signal(**({name: 100 + number} if number % 2 else {}))
    scene.inside()
    assert not scene.thread.pause_ns


def test_flags_and_the_number_of_a_call_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    for number in range(2):
        scene.inside()
        scene.signal(orig_rax=number + 5, rflags=number + 5)
    scene.inside()
    assert scene.thread.pause_ns


def test_there_are_no_pauses_where_they_are_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, usable=False)
    scene.held_up()
    for _ in range(3):
        scene.regs.rip, scene.regs.rax = AEP, ERESUME
        scene.pauses.before_return(scene.thread, ALARM)
    assert not scene.thread.pause_ns


def test_a_pause_ends_when_the_thread_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    scene.thread.running = True
    scene.go()
    scene.pass_time(1, ran=1)
    scene.go()
    assert (scene.mask, scene.interrupts) == (ALL_OTHERS, 0)
    scene.pass_time(1, ran=0)
    assert scene.interrupts == 1
    scene.go()
    assert (scene.mask, scene.thread.blocked, scene.thread.pause_ns) == (USR1, None, 0)
    assert scene.waits.look_ns is None


def test_a_thread_without_a_processor_gets_longer_pauses_to_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, lengths = Scene(monkeypatch), []
    scene.ran = 77 * MS  # before
    scene.held_up()
    while scene.thread.pause_ns:
        lengths.append(scene.thread.pause_ns // MS)
        scene.pass_time(lengths[-1], ran=0)
        scene.go()
    assert lengths == [2, 4, 8, 16, 32, 64]
    assert not scene.interrupts, "it was stopped all the time"


def test_a_thread_that_has_ended_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    scene.thread.running = True
    scene.thread.image.threads.clear()
    scene.pass_time(2, ran=0)
    assert (scene.interrupts, scene.waits.look_ns) == (0, None)


def test_a_pause_that_a_longer_one_has_replaced_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    scene.thread.running = True
    scene.thread.paused_until_ns = 5 * MS
    scene.pass_time(3, ran=0)
    assert (scene.interrupts, scene.waits.look_ns) == (0, 5 * MS)


def test_signals_of_faults_stay_unblocked_and_are_blocked_again_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, mask=USR1 | FAULTS)
    scene.held_up()
    assert (scene.mask, scene.thread.blocked) == (ALL_OTHERS, USR1 | FAULTS)
    scene.pass_time(2, ran=1)
    scene.go()
    assert (scene.mask, scene.thread.blocked) == (USR1, USR1 | FAULTS)
    block_signals_again(scene.thread)
    assert scene.mask == USR1 | FAULTS


def test_a_thread_that_leaves_has_its_mask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    block_signals_again(scene.thread)
    assert (scene.mask, scene.thread.blocked, scene.thread.pause_ns) == (USR1, None, 0)
    scene.thread.running = True
    scene.pass_time(2, ran=0)
    assert not scene.interrupts


def test_a_pause_that_an_interrupt_has_ended_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    begin_again(scene.thread)
    assert (scene.mask, scene.thread.pause_ns) == (USR1, 0)
    scene.inside()
    assert (scene.mask, scene.thread.pause_ns) == (ALL_OTHERS, 2 * MS)


def test_the_second_signal_in_front_of_eresume_stays_pending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)
    scene.regs.rip, scene.regs.rax = AEP, ERESUME
    scene.pauses.before_return(scene.thread, ALARM)
    assert scene.mask == USR1
    scene.pauses.before_return(scene.thread, ALARM)
    assert (scene.mask, scene.thread.blocked) == (ALL_OTHERS, USR1)
    scene.inside()
    assert (scene.mask, scene.thread.blocked) == (ALL_OTHERS, USR1), "it is back, in its pause"
    scene.pauses.end(scene.thread)
    assert scene.mask == USR1
    scene.pauses.end(scene.thread)
    assert scene.mask == USR1


@pytest.mark.parametrize("number", [QUEUED, SEGV, abi.SIGSTOP])
def test_some_signals_do_not_stay_pending(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    scene = Scene(monkeypatch)
    scene.regs.rip, scene.regs.rax = AEP, ERESUME
    for _ in range(3):
        scene.pauses.before_return(scene.thread, number)
    assert scene.mask == USR1


@pytest.mark.parametrize(("code", "rax"), [(b"\x90\x90\x90", ERESUME), (b"\x0f\x01\xd7", 2)])
def test_other_code_outside_gets_no_pause(
    monkeypatch: pytest.MonkeyPatch, code: bytes, rax: int
) -> None:
    scene = Scene(monkeypatch)
    scene.code = code
    scene.regs.rip, scene.regs.rax = AEP, rax
    for _ in range(3):
        scene.pauses.before_return(scene.thread, ALARM)
    assert scene.mask == USR1


def test_a_handler_does_not_begin_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.held_up()
    scene.go(ALARM)
    assert scene.mask == ALL_OTHERS, "it stays pending"
    scene.go(SEGV)
    assert (scene.mask, scene.thread.pause_ns) == (USR1, 0)


def test_processor_time_is_that_of_the_kernel() -> None:
    first = pauses._run_time_ns(cast(Any, SimpleNamespace(tid="thread-self")))
    sum(range(100_000))
    assert first <= pauses._run_time_ns(cast(Any, SimpleNamespace(tid="thread-self")))
    assert pauses._run_time_ns(cast(Any, SimpleNamespace(tid="none"))) == 0
