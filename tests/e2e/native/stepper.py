"""Stops threads at each instruction of code behind our vDSO, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import decode_stop

__all__ = ["Stepper"]


class Stepper:
    """Lets threads go on a step at a time, to stop one at each instruction that counts, in turn.

    Args:
        number: the signal that stops them; 0: an interrupt by the supervisor does.
        counts: whether code at an offset from our vDSO does.
        steps: whether a thread has to go on in steps.

    Attributes:
        stops: how often that was.
    """

    def __init__(
        self,
        number: int,
        counts: Callable[[ProcessImage, int], bool],
        steps: Callable[[ProgramThread], bool],
    ) -> None:
        self.number, self.stops, self._counts, self._steps = number, 0, counts, steps
        self._target, self._seen = 0, 0
        self.resume = ProgramThread.resume

    def __call__(self, thread: ProgramThread, number: int = 0) -> None:
        image = thread.image
        if number or thread.in_call or not self._steps(thread):
            self.resume(thread, number)
            return
        while True:
            thread.flush()
            libc.ptrace(abi.PTRACE_SINGLESTEP, thread.tid, 0, 0)
            status = thread.waits.of(thread.tid)
            stop = decode_stop(status)
            if stop.event or stop.signal != signal.SIGTRAP or not os.WIFSTOPPED(status):
                thread.waits.keep(thread.tid, status)
                return
            thread.stopped(status)
            if not self._counts(image, thread.load().rip - image.vdso_base):
                continue
            self._seen += 1
            if self._seen > self._target:
                self._target, self._seen, self.stops = self._target + 1, 0, self.stops + 1
                if self.number:
                    os.kill(thread.tid, self.number)
                else:
                    thread.interrupt()
                self.resume(thread)
                return
