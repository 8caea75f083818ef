"""Keeping a program of one thread on the supervisor's processor.

At each stop of a thread the kernel switches to the supervisor and back.  Between two processors
that costs three times as much as on one, because the idle one must be woken each time.  So as long
as the program has one thread, both stay on one processor; as soon as there is a second thread,
supervisor and program may run on all processors again.

The program does not see it: sched_getaffinity returns the processors that it would have without the
supervisor.  Once the program has chosen processors itself, the supervisor no longer changes them.

Source:
    sched_setaffinity(2), sched(7).
"""

from __future__ import annotations

import os

from softsgx.engines.native import libc
from softsgx.engines.native.doctor import can_choose_processors
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.errors import SoftSgxError

__all__ = ["Affinity"]


class Affinity:
    """See the module.

    Args:
        cpus: processors for program and supervisor, which then stay as they are; ``None`` for one
            while one is enough.
    """

    def __init__(self, cpus: set[int] | None) -> None:
        self._before = os.sched_getaffinity(0)
        self._automatic = cpus is None and len(self._before) > 1 and can_choose_processors()
        self._tids: set[int] = set()
        self._together: set[int] | None = None
        if cpus is not None:
            try:
                os.sched_setaffinity(0, cpus)
            except OSError as error:
                raise SoftSgxError(
                    f"processors {sorted(cpus)}: {error.strerror}; leave the choice out"
                ) from None

    def born(self, tid: int) -> None:
        """A thread was made; it has its maker's processors."""
        self._tids.add(tid)
        self._arrange()

    def gone(self, tid: int) -> None:
        """A thread has ended."""
        self._tids.discard(tid)
        self._arrange()

    def close(self) -> None:
        """Give the supervisor its own processors back."""
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
            self._together = None
            self._apply(self._before)
        self._automatic = False
        return None

    def _arrange(self) -> None:
        alone = len(self._tids) == 1
        if not self._automatic or not self._tids or alone == (self._together is not None):
            return
        self._together = {libc.current_cpu()} if alone else None
        self._apply(self._together or self._before)

    def _apply(self, cpus: set[int]) -> None:
        for tid in (0, *self._tids):
            try:
                os.sched_setaffinity(tid, cpus)
            except OSError:
                continue  # it has ended, or its processors are offline: it stays where it is
