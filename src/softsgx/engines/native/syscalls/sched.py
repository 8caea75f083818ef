"""Keeping a program of which one thread runs at a time on the supervisor's processor.

At each stop of a thread the kernel switches to the supervisor and back.  Between two processors
that costs three times as much as on one, because the idle one must be woken each time.  So as long
as the program has one thread, both stay on one processor.  A second thread of a process lets
supervisor and program run on all processors again.

A child process shares the processor at first, since most parents wait for their children.  While
there are several processes, the supervisor looks now and then how many threads want to run.  When
two did at two looks in a row, all get all processors, until one thread is left.

The program does not see it: sched_getaffinity returns the processors that it would have without the
supervisor.  Once the program has chosen processors itself, the supervisor no longer changes them.

Source:
    sched_setaffinity(2), sched(7); proc(5): ``/proc/PID/stat``.
"""

from __future__ import annotations

import os

from softsgx.engines.native import libc
from softsgx.engines.native.doctor import can_choose_processors
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.errors import SoftSgxError

__all__ = ["Affinity"]

_FIRST_LOOK_NS, _LONGEST_PERIOD_NS = 2_000_000, 32_000_000
#: A program with more threads gets all processors without a look at each.
_MOST_LOOKED_AT = 16


class Affinity:
    """See the module.

    Args:
        cpus: processors for program and supervisor, which then stay as they are; ``None`` for one
            while one is enough.
        waits: of the supervisor, which are interrupted for the looks.
    """

    def __init__(self, cpus: set[int] | None, waits: Waits) -> None:
        self._before = os.sched_getaffinity(0)
        self._automatic = cpus is None and len(self._before) > 1 and can_choose_processors()
        self._waits, self._period_ns = waits, _FIRST_LOOK_NS
        self._several = False  # threads wanted to run at the last look
        self._tids: set[int] = set()
        self._together: set[int] | None = None
        if cpus is not None:
            try:
                os.sched_setaffinity(0, cpus)
            except OSError as error:
                raise SoftSgxError(
                    f"processors {sorted(cpus)}: {error.strerror}; leave the choice out"
                ) from None

    def born(self, tid: int, *, alone: bool = True) -> None:
        """A thread was made; it has its maker's processors.

        Args:
            tid: its id.
            alone: whether it is the only thread of its process.
        """
        if tid in self._tids:
            return
        self._tids.add(tid)
        if len(self._tids) == 1:
            self._share()
        elif self._together is not None:
            if alone and len(self._tids) <= _MOST_LOOKED_AT:
                self._look_in(_FIRST_LOOK_NS)
            else:
                self._spread()

    def gone(self, tid: int) -> None:
        """A thread has ended."""
        self._tids.discard(tid)
        if len(self._tids) == 1:
            self._waits.look_at(self._look, None)
            self._share()

    def close(self) -> None:
        """Give the supervisor its own processors back."""
        self._waits.look_at(self._look, None)
        if can_choose_processors():
            os.sched_setaffinity(0, self._before)

    def getaffinity(self, thread: ProgramThread) -> int | None:
        """Do ``sched_getaffinity``: the answer is what it would be without us."""
        if self._together is None:
            return None
        together, self._together = self._together, None
        self._apply(self._before)
        result = thread.finish_syscall()
        self._together = together
        self._apply(together)
        return result

    def setaffinity(self, thread: ProgramThread) -> int | None:
        """Do ``sched_setaffinity``: from now on the program chooses its processors."""
        if self._together is not None:
            self._spread()
        self._automatic = False
        return None

    def _share(self) -> None:
        """Move the program's only thread and the supervisor to one processor."""
        if self._automatic and self._together is None:
            self._together = {libc.current_cpu()}
            self._apply(self._together)

    def _spread(self) -> None:
        """Let program and supervisor run on all processors."""
        self._together, self._several = None, False
        self._waits.look_at(self._look, None)
        self._apply(self._before)

    def _look_in(self, period_ns: int) -> None:
        """Look after a time, or earlier if that is planned already."""
        self._period_ns = period_ns
        self._waits.look_at(self._look, self._waits.clock() + period_ns)

    def _look(self) -> None:
        """Spread the program if several threads want to run, twice in a row; else look again."""
        several = sum(_wants_to_run(tid) for tid in self._tids) > 1
        if several and self._several:
            self._spread()
            return
        self._several = several
        self._look_in(_FIRST_LOOK_NS if several else min(2 * self._period_ns, _LONGEST_PERIOD_NS))

    def _apply(self, cpus: set[int]) -> None:
        for tid in (0, *self._tids):
            try:
                os.sched_setaffinity(tid, cpus)
            except OSError:
                continue  # it has ended, or its processors are offline: it stays where it is


def _wants_to_run(tid: int) -> bool:
    """Return whether a thread runs, or waits for a processor."""
    try:
        with open(f"/proc/{tid}/stat", "rb", buffering=0) as stat:
            text = stat.read(512)
    except OSError:
        return False  # it has ended
    return text.rpartition(b") ")[2].startswith(b"R")  # the name may have brackets, too
