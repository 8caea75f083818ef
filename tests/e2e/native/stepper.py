"""Stops threads at each instruction of code behind our vDSO, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from ctypes import addressof

import pytest

from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import decode_stop

__all__ = ["Stepper", "go_in_steps"]

_TF = 0x100


def go_in_steps(
    monkeypatch: pytest.MonkeyPatch,
    steps: Callable[[ProgramThread], bool],
    after: Callable[[ProgramThread, int], bool],
) -> None:
    """Let the loop resume threads by single steps; calls in their name run as they are.

    Args:
        monkeypatch: undoes it.
        steps: whether a thread has to go on in steps.
        after: is called with a thread and its RIP after each step; returns whether the thread
            then goes on without steps, up to its next stop.
    """
    go = Loop._go

    def step(loop: Loop, thread: ProgramThread, number: int = 0) -> None:
        if number or thread.in_call or not steps(thread):
            go(loop, thread, number)
            return
        while True:
            thread.flush()
            libc.ptrace(abi.PTRACE_SINGLESTEP, thread.tid, 0, 0)
            status = thread.waits.of(thread.tid)
            _forget_step(thread.tid, status)
            stop = decode_stop(status)
            if stop.event or stop.signal != signal.SIGTRAP or not os.WIFSTOPPED(status):
                thread.waits.keep(thread.tid, status)
                return
            thread.stopped(status)
            if thread.siginfo().code == abi.SI_KERNEL:  # INT3 in the place of an instruction
                thread.waits.keep(thread.tid, status)
                return
            if after(thread, thread.load().rip):
                go(loop, thread)
                return

    monkeypatch.setattr(Loop, "_go", step)


def _forget_step(tid: int, status: int) -> None:
    """Remove TF from the flags of a thread that has stopped.

    The kernel does not show the TF of a single step.  But when it has stepped over a POPF, it takes
    the TF of later steps for the program's, and leaves it when the thread goes on without steps.
    """
    regs = UserRegs()
    if not os.WIFSTOPPED(status):
        return
    if not kernel.try_ptrace(abi.PTRACE_GETREGS, tid, 0, addressof(regs)) and regs.rflags & _TF:
        regs.rflags &= ~_TF
        kernel.try_ptrace(abi.PTRACE_SETREGS, tid, 0, addressof(regs))


class Stepper:
    """Lets threads go on a step at a time, to stop one at each instruction that counts, in turn.

    Args:
        monkeypatch: undoes it.
        number: the signal that stops them; 0: an interrupt by the supervisor does.
        counts: whether code at an offset from our vDSO does.
        steps: whether a thread has to go on in steps.

    Attributes:
        stops: how often that was.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        counts: Callable[[ProcessImage, int], bool],
        steps: Callable[[ProgramThread], bool],
    ) -> None:
        self.number, self.stops, self._counts = number, 0, counts
        self._target, self._seen = 0, 0
        go_in_steps(monkeypatch, steps, self._after)

    def _after(self, thread: ProgramThread, rip: int) -> bool:
        if not self._counts(thread.image, rip - thread.image.vdso_base):
            return False
        self._seen += 1
        if self._seen <= self._target:
            return False
        self._target, self._seen, self.stops = self._target + 1, 0, self.stops + 1
        if self.number:
            os.kill(thread.tid, self.number)
        else:
            thread.interrupt()
        return True
