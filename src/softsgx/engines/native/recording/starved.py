"""Threads whose page was made usable, and which have perhaps not executed since.

On a busy machine a thread may wait for a processor for longer than an interval.  If its page were
hidden meanwhile, it would fault again, and it might never execute.  So an interval ends only when
each thread that has faulted in it

- has been scheduled since the supervisor resumed it, and is not stopped at another fault,
- waits for something else than a processor,
- has stopped elsewhere, or
- has faulted :data:`_MOST_FAULTS` times after the interval was over: no instruction needs as many
  pages, so it has executed some.

Threads that a signal or the supervisor keeps stopped do not delay intervals for longer than that
many looks at them.

Source:
    Linux, Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat": the third number
    counts how often the task was given a processor.
"""

from __future__ import annotations

import os
from contextlib import suppress

from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["Starved"]

_MOST_FAULTS = 64
"""VGATHERDPS uses 16 elements, each of which may lie in two pages."""
_RUNNABLE, _TRACED = b"R", b"t"


class _Fault:
    """The last fault of a thread in this interval.

    Attributes:
        rip: where.
        turns: how often the thread had been given a processor when it was resumed.
        left: how many more faults the interval waits for.
    """

    __slots__ = ("left", "rip", "turns")

    def __init__(self, rip: int, turns: int) -> None:
        self.rip, self.turns, self.left = rip, turns, _MOST_FAULTS


class Starved:
    """See the module."""

    def __init__(self) -> None:
        self._faults: dict[ProgramThread, _Fault] = {}
        self._closing: set[ProgramThread] | None = None

    def resuming(self, thread: ProgramThread, *, faulted: bool) -> None:
        """The supervisor is about to resume a thread, whose registers it has.

        Args:
            thread: it is stopped.
            faulted: its fault was answered; otherwise it has stopped for another reason.
        """
        known, rip = self._faults.get(thread), thread.regs.rip
        if known is None and not faulted:
            return
        if known is not None and known.rip != rip:
            self._done(thread)
            known = None
        if known is None:
            if faulted:
                self._faults[thread] = _Fault(rip, _turns(thread.tid))
            return
        known.turns = _turns(thread.tid)
        if self._closing is not None and thread in self._closing:
            known.left -= 1
            if not known.left:
                self._done(thread)

    @property
    def follows(self) -> bool:
        """Whether some thread has faulted in this interval."""
        return bool(self._faults)

    def any(self) -> bool:
        """The interval is over: return whether it has to wait for a thread."""
        if self._closing is None:
            self._closing = set(self._faults)
        for thread in list(self._closing):
            if self._executed(thread):
                self._done(thread)
        return bool(self._closing)

    def begin(self) -> None:
        """Another interval begins."""
        self._faults.clear()
        self._closing = None

    def _done(self, thread: ProgramThread) -> None:
        self._faults.pop(thread, None)
        if self._closing is not None:
            self._closing.discard(thread)

    def _executed(self, thread: ProgramThread) -> bool:
        fault = self._faults[thread]
        turns, state = _turns(thread.tid), _state(thread.tid)
        if state == _TRACED:  # the loop handles its stop next, or a signal has stopped it for long
            fault.left -= 1
            return not fault.left
        return state != _RUNNABLE or turns > fault.turns or not turns


def _turns(tid: int) -> int:
    """Return how often a thread was given a processor; 0: it has ended, or Linux does not count."""
    with suppress(OSError, ValueError, IndexError):
        return int(_contents(f"/proc/{tid}/schedstat").split()[2])
    return 0


def _state(tid: int) -> bytes:
    """Return a thread's state as in proc_pid_stat(5); ``Z``: it has ended."""
    with suppress(OSError):
        return _contents(f"/proc/{tid}/stat").rpartition(b")")[2][1:2]
    return b"Z"


def _contents(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)
